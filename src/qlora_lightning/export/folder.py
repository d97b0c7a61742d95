"""What a merged model's folder holds beside its weights: configuration, generation settings, tokenizer and licence."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_lightning.data.rendering import load_renderer
from qlora_lightning.data.templates import find_template
from qlora_lightning.errors import UserError
from qlora_lightning.export.chat_jinja import chat_template
from qlora_lightning.modeling.sources import hub_errors, resolve_base

_LICENCES = ["LICENSE*", "NOTICE*", "USE_POLICY*"]
_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", *_LICENCES]
"""Of a repository on the hub; Mistral's also hold the same weights as consolidated.safetensors."""


def base_folder(source: str, revision: str | None) -> Path:
    """The local folder of a base model named as in ``resolve_base``; of a hub id, what the cache lacks is downloaded first.

    Raises:
        UserError: there is no such model, or no access.
    """
    resolved = resolve_base(source)
    if Path(resolved).is_dir():
        return Path(resolved)
    with hub_errors(source):
        return Path(snapshot_download(resolved, revision=revision, allow_patterns=_FILES, ignore_patterns=["consolidated*"]))


def base_config(base: Path) -> dict[str, Any]:
    """The configuration of a base model folder.

    Raises:
        UserError: its weights are stored quantised, so that there are no 16-bit ones to merge into.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"merging needs a base in 16 or 32 bits, but {base} is stored quantised ({method}); give the original one with --base_model"
        )
    return config


def set_chat_template(tokenizer: PreTrainedTokenizerFast, adapter: Path, style: Mapping[str, Any]) -> str:
    """Give the base's tokenizer the chat template that fits the training, and say in words which that is.

    Args:
        tokenizer: The base's, to be changed.
        adapter: The adapter folder; a chat template that it carries goes before the base's.
        style: ``template`` and ``system_prompt`` as the adapter's metadata has them; None where they are not known.
    """
    name = style["template"]
    template = find_template(name) if name else None
    if template is not None:
        bos = tokenizer.bos_token
        tokenizer.chat_template = chat_template(template, bool(bos) and bos not in template.control, style["system_prompt"])
        return f"`{name}`, as trained"
    if (adapter / "tokenizer_config.json").is_file():
        with hub_errors(str(adapter)):
            carried = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False).chat_template
        if carried:
            tokenizer.chat_template = carried
            return "the adapter's own"
    return "the base's own" if tokenizer.chat_template else "none"


def write_settings(folder: Path, base: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    """Write everything but weights and card.

    Args:
        folder: Where; it exists.
        base: The base model's folder.
        dtype: Of the merged weights.
        tokenizer: As it is to be written.
        template: The prompt template of the training; None where it is not known.
    """
    config = base_config(base)
    for name in ("torch_dtype", "_name_or_path"):
        config.pop(name, None)
    _write(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    ends = load_renderer(template, tokenizer).end_tokens if template else []
    _write_generation(folder, base, [int(number) for number in tokenizer.convert_tokens_to_ids(ends)])  # type: ignore[union-attr]
    tokenizer.save_pretrained(folder)
    for file in (file for pattern in _LICENCES for file in base.glob(pattern)):
        shutil.copy(file, folder / file.name)


def _write_generation(folder: Path, base: Path, ends: list[int]) -> None:
    """The base's generation settings, which also stop at the tokens that end an answer in the style of training."""
    file = base / "generation_config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    old = settings.get("eos_token_id")
    ids = list(dict.fromkeys([*(old if isinstance(old, list) else [] if old is None else [old]), *ends]))
    if ids:
        settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    if settings:
        _write(folder / "generation_config.json", settings)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
