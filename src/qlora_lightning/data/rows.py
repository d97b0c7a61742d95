"""What a row is, the text in its fields, and what is made of it: conversations. Errors name the row."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from qlora_lightning.errors import UserError

Row = dict[str, Any]
Located = tuple[str, Row]
"""A row with the place that errors name it by: ``rows.jsonl:7``, ``rows.json: row 3``, ``set.zip/core.jsonl:12``."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """What one side says once. ``context`` is an instruction's separate input; a template without a place for it appends it."""

    role: Role
    content: str
    context: str = ""


Conversation = list[Message]

_SURROGATE = re.compile("[\ud800-\udfff]")


def text_of(row: Row, name: str, where: str, may_be_empty: bool = False) -> str:
    """The text in one field of a row.

    Raises:
        UserError: it is missing, null, not text, empty where it may not be, or no valid Unicode.
    """
    if name not in row:
        raise UserError(f"{where}: the row needs a field {name!r}, found {fields_of(row)}; add it, or name the set's data.dataset.format")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {name!r} must be text, got {'null' if value is None else type(value).__name__}; correct or remove the row"
        )
    if not may_be_empty and not value.strip():
        raise UserError(f"{where}: field {name!r} must not be empty, got {value!r}; correct or remove the row")
    if _SURROGATE.search(value):
        raise UserError(f"{where}: field {name!r} holds half a surrogate pair, which is no Unicode text; correct or remove the row")
    return value


def fields_of(row: Row) -> str:
    """The names of a row's fields, for errors."""
    return ", ".join(sorted(str(name).encode(errors="backslashreplace").decode() for name in row)) or "none"
