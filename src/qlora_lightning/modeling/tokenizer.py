"""The base model's fast tokenizer, as its makers ship it: no token is ever added, no special token renamed."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import first_line, hub_errors, quiet_transformers, resolve_base


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a base model named as in ``resolve_base``.

    Raises:
        UserError: there is none, its files are broken, or it has no fast implementation (loss masks need its character offsets).
    """
    resolved = resolve_base(source)
    with hub_errors(source), quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolved, revision=revision or "main")
        except ValueError as error:
            raise UserError(f"base model {source} has no usable tokenizer ({first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer of {source} is {type(tokenizer).__name__}, without character offsets; loss masks need a fast tokenizer"
        )
    return tokenizer


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill rows with. Masks and labels come from lengths, so that any id serves; eos is avoided for the reader's sake."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.unk_token_id or 0)
