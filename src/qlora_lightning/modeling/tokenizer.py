"""The base model's fast tokenizer, as its makers ship it: no token is ever added, no special token renamed."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import first_line, hub_errors, quiet_transformers, resolve_base


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a base model named as in ``resolve_base``.

    Raises:
        UserError: there is none, its files are broken, or it has no fast implementation (loss masks need its character offsets).
    """
    resolved = resolve_base(source, weights=False)
    with hub_errors(source), quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolved, revision=revision or "main", trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise
            raise UserError(f"base model {source} has no usable tokenizer ({first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer of {source} is {type(tokenizer).__name__}, without character offsets; loss masks need a fast tokenizer"
        )
    return tokenizer


@lru_cache(maxsize=1)  # most of a second for a large vocabulary, and every checkpoint has it
def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hexadecimal digits for all that text becomes tokens by, the special tokens included; the same in every process.

    The chat template is not part of it, as a prompt need not come from there, nor are padding and truncation, which every call sets.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["padding"], rules["truncation"]
    text = json.dumps([rules, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, metadata: Mapping[str, Any], source: Path) -> None:
    """Compare the base's tokenizer with the one that an adapter was trained with, where its folder records one.

    Args:
        tokenizer: The base model's, as it is now.
        metadata: The adapter's, see ``adapters.adapter_metadata``.
        source: The adapter folder.

    Raises:
        UserError: they turn text into other tokens, which would make gibberish of every answer.
    """
    mine, recorded = tokenizer_digest(tokenizer), metadata.get("tokenizer")
    if recorded not in (None, mine):
        raise UserError(
            f"{source} was trained with another tokenizer ({recorded}) than the base model has now ({mine}); give the base that it was "
            f"trained on, or give this one its tokenizer back: {source}/tokenizer.json is a copy"
        )


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill rows with. Masks and labels come from lengths, so that any id serves; eos is avoided for the reader's sake."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.unk_token_id or 0)
