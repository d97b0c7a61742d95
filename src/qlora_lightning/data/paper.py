"""What the code of the QLoRA authors (github.com/artidoro/qlora) made of each row: pairs of a source and a target, flaws included.

Sources and targets are tokenized separately there. Most conversations have no source, so that the human's turns are trained on too.
Turns and empty answers are not checked.
"""

from collections.abc import Callable, Iterator

from qlora_lightning.data.oasst1 import Turn
from qlora_lightning.data.rows import Row, text_of
from qlora_lightning.data.templates import TEMPLATES
from qlora_lightning.errors import UserError

Pair = tuple[str, str]
"""A source and a target, both possibly empty."""

_ALPACA = TEMPLATES["alpaca"]
_ASKED = _ALPACA.preamble + _ALPACA.user + _ALPACA.header + _ALPACA.lead
_ASKED_WITH_INPUT = f"{_ALPACA.preamble_with_context}{_ALPACA.user_with_context}{_ALPACA.header}{_ALPACA.lead}"


def text(row: Row, name: str, where: str) -> str:
    """The text in a field, which may be empty."""
    return text_of(row, name, where, may_be_empty=True)


def instruction(row: Row, where: str) -> list[Pair]:
    """The Alpaca prompt up to the blank after ``### Response:``, and the output. Any input that is not "" is one, ``<noinput>`` too."""
    context = text(row, "input", where) if row.get("input") is not None else ""
    source = (_ASKED_WITH_INPUT if context else _ASKED).format(content=text(row, "instruction", where), context=context)
    return [(source, text(row, "output", where))]


def conversation(turns: list[Turn]) -> Pair:
    """A conversation of OASST1 as in the authors' subset of it: one text, nothing between the turns."""
    marks = {"prompter": "### Human: ", "assistant": "### Assistant: "}
    return "", "".join(marks[role] + content for role, content in turns)


def guanaco_text(row: Row, where: str) -> list[Pair]:
    """The ``text`` as it is."""
    return [("", text(row, "text", where))]


def hh_rlhf(row: Row, where: str) -> list[Pair]:
    """The ``chosen`` transcript as it is."""
    return [("", text(row, "chosen", where))]


def chip2(row: Row, where: str) -> list[Pair]:
    """What stands before the first ``<bot>:`` line, and what stands between it and the second."""
    parts = text(row, "text", where).split("\n<bot>: ")
    if len(parts) < 2:
        raise UserError(f"{where}: field 'text' needs a line that begins with '<bot>: ', found none; correct or remove the row")
    return [(parts[0].replace("<human>: ", ""), parts[1])]


def pair(row: Row, where: str, names: tuple[str, str]) -> list[Pair]:
    """Two fields as they are."""
    return [(text(row, names[0], where), text(row, names[1], where))]


def unnatural(instances: Iterator[tuple[str, Row]]) -> list[Pair]:
    """Each instance's ``instruction_with_input`` and ``output``; constraints are not read."""
    return [(text(fields, "instruction_with_input", where), text(fields, "output", where)) for where, fields in instances]


SHAPES: dict[str, Callable[[Row, str], list[Pair]]] = {
    "instruction": instruction,
    "guanaco_text": guanaco_text,
    "hh_rlhf": hh_rlhf,
    "chip2": chip2,
}
"""Shapes that need a row's fields alone."""
