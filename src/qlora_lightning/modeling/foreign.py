"""What a base model from elsewhere may not make its loaders do: run code, read pickles, follow names out of its folder.

transformers refuses some of it late, asks at the terminal about some, and follows the rest without a word.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, find_adapter_config_file

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import TO_CONVERT

SAFE_ENDINGS = (".safetensors", ".safetensors.index.json")


def check_base_files(resolved: str, revision: str | None, source: str) -> None:
    """Refuse a base whose files lead elsewhere. Call it inside ``sources.hub_errors``.

    Args:
        resolved: A local folder or a hub id.
        revision: Commit, tag or branch of a hub id.
        source: What the user called it.

    Raises:
        UserError: the line says which file asks for what.
    """
    values, _ = PreTrainedConfig.get_config_dict(resolved, revision=revision or "main")
    weights = str(values.get("transformers_weights") or SAFE_ENDINGS[0])
    if not weights.endswith(SAFE_ENDINGS):
        raise UserError(f"base model {source} must hold its weights as safetensors, but its config.json names {weights!r}; {TO_CONVERT}")
    kernel = next((name for name in _attention_names(values) if "/" in name), None)
    if kernel is not None:
        raise UserError(
            f"base model {source} asks in its config.json for attention code from the hub ({kernel}), which is never fetched; "
            "remove attn_implementation there, or give another base"
        )
    if find_adapter_config_file(resolved, revision=revision or "main") is not None:
        raise UserError(
            f"base model {source} holds an adapter (adapter_config.json), which would be loaded with it; "
            "give the base that it was trained on, or merge the two first"
        )
    _check_shards(resolved, revision, source)


def _attention_names(values: dict[str, Any]) -> list[str]:
    """What a configuration and those inside it (text, vision) call their attention."""
    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    own = [values[key] for key in keys if key in values]
    named = [str(name) for one in own for name in (one.values() if isinstance(one, dict) else [one])]
    return named + [name for one in values.values() if isinstance(one, dict) for name in _attention_names(one)]


def _check_shards(resolved: str, revision: str | None, source: str) -> None:
    """The index of sharded weights names their files; transformers opens whatever it names."""
    index = cached_file(
        resolved,
        SAFE_WEIGHTS_INDEX_NAME,
        revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
    )
    if index is None:
        return
    try:
        files = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"base model {source} has a broken {SAFE_WEIGHTS_INDEX_NAME}; copy or download it again") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"base model {source} may name only .safetensors files beside it in {SAFE_WEIGHTS_INDEX_NAME}, found {file!r}; "
                "copy or download its files again"
            )


class _WholeReader(gguf.GGUFReader):
    """The reader of the gguf package, which takes a read beyond the file's end for an empty one and then counts on.

    A header of a few bytes could make it count to 2^64 in that way. Here such a read is an error, and a count is at most what the file
    has room for.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early, or says wrong lengths")
        return super()._get(offset, dtype, count, override_order)


def check_gguf(file: Path) -> None:
    """Read a GGUF file's header and the places of its tensors; weights stay where they are.

    Raises:
        Exception: it is broken; of what class depends on where.
    """
    _WholeReader(file)
