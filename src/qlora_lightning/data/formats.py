"""Row shapes: one plain function each, from a row's fields to its conversations. A new shape is one function and one line in ``FORMATS``.

A missing, null or non-text field is an error that names the row. An empty answer is not: real sets have a few; such rows are counted
and left out.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

from qlora_lightning.data import oasst1, paper, transcripts
from qlora_lightning.data.rows import Conversation, Located, Message, Role, Row, fields_of, text_of
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_NO_INPUT = ("noinput", "noinputneeded", "noinputrequired")  # as Alpaca's rows spell it, in many ways, once signs and blanks are gone
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("input", "output"), ("inputs", "targets"))
_END_OF_TEXT = "<|endoftext|>"


def instruction(row: Row, where: str) -> list[Conversation]:
    """Alpaca: ``instruction``, ``output`` and an optional ``input``, where ``<noinput>``, its variants and "" mean that there is none."""
    return [[_instruct(row, where), _answer(row, "output", where)]]


def _instruct(row: Row, where: str) -> Message:
    context = text_of(row, "input", where, may_be_empty=True) if row.get("input") is not None else ""
    if not context.strip() or re.sub(r"[\W_]+", "", context.lower()) in _NO_INPUT:
        context = ""
    return Message("user", text_of(row, "instruction", where), context)


def _answer(row: Row, name: str, where: str) -> Message:
    return Message("assistant", text_of(row, name, where, may_be_empty=True))


def prompt_response(row: Row, where: str) -> list[Conversation]:
    """A pair: ``prompt`` and ``response`` or ``completion``, ``input`` and ``output``, or ``inputs`` and ``targets`` (FLAN)."""
    ask, answer = _pair(row) or _PAIRS[0]
    return [[Message("user", text_of(row, ask, where)), _answer(row, answer, where)]]


def _pair(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all(name in row for name in pair)), None)


def self_instruct(row: Row, where: str) -> list[Conversation]:
    """``prompt``, kept as it is, and ``completion``, less the literal ``<|endoftext|>`` at its end and the blanks round it."""
    answer = text_of(row, "completion", where, may_be_empty=True).rstrip().removesuffix(_END_OF_TEXT).strip()
    return [[Message("user", text_of(row, "prompt", where)), Message("assistant", answer)]]


def unnatural(row: Row, where: str, reformulations: bool = True) -> list[Conversation]:
    """An ``instruction`` with its ``instances``, and where asked for its ``reformulations``: one conversation each.

    The user says ``instruction_with_input``, or where there is none the instruction with ``input`` as context (Self-Instruct's seeds).
    """
    return [[_instance(fields, row, place), _answer(fields, "output", place)] for place, fields in _instances(row, where, reformulations)]


def _instances(row: Row, where: str, reformulations: bool) -> Iterator[Located]:
    for name in ("instances", "reformulations") if reformulations else ("instances",):
        listed = row.get(name) if name == "instances" else row.get(name) or []
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise UserError(f"{where}: field {name!r} must be a list of objects, found {fields_of(row)}; correct or remove the row")
        for number, fields in enumerate(listed, 1):
            yield f"{where}: {name} {number}", fields


def _instance(fields: Row, row: Row, where: str) -> Message:
    if fields.get("instruction_with_input") is not None:
        return Message("user", text_of(fields, "instruction_with_input", where))
    return _instruct({**{name: row[name] for name in ("instruction",) if name in row}, **fields}, where)


def messages(row: Row, where: str) -> list[Conversation]:
    """A list ``messages`` of ``role`` and ``content``, or ``conversations`` of ``from`` and ``value`` (ShareGPT)."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f"{where}: the row needs a list 'messages' of role and content, found {fields_of(row)}; correct it or name data.dataset.format"
        )
    return [[_turn(turn, f"{where}: message {number}") for number, turn in enumerate(turns, 1)]]


def _turn(turn: Row, where: str) -> Message:
    name, content = ("from", "value") if "from" in turn else ("role", "content")
    role = _ROLES.get(text_of(turn, name, where))
    if role is None:
        raise UserError(f"{where}: a role must be one of {', '.join(_ROLES)}, got {turn[name]!r}; correct or remove the row")
    return Message(role, text_of(turn, content, where, may_be_empty=role == "assistant"))


def oasst1_tree(row: Row, where: str, choice: Literal["best", "all"] = "best", languages: list[str] | None = None) -> list[Conversation]:
    """An OASST1 message tree: the best-ranked path, or every path. A path ends with an assistant; deleted messages have no replies."""
    spoken: dict[oasst1.Role, Role] = {"prompter": "user", "assistant": "assistant"}
    return [[Message(spoken[role], text) for role, text in path] for path in oasst1.paths(_root(row, where), where, choice, languages)]


def _root(row: Row, where: str) -> Row:
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise UserError(f"{where}: the row needs a message tree 'prompt', found {fields_of(row)}; correct it or name data.dataset.format")
    return root


FORMATS: dict[str, Callable[[Row, str], list[Conversation]]] = {
    "instruction": instruction,
    "prompt_response": prompt_response,
    "messages": messages,
    "guanaco_text": transcripts.guanaco_text,
    "oasst1_tree": oasst1_tree,
    "oasst1_messages": oasst1_tree,  # as ``gather`` gives them
    "hh_rlhf": transcripts.hh_rlhf,
    "self_instruct": self_instruct,
    "unnatural": unnatural,
    "chip2": transcripts.chip2,
}
_OASST1 = ("oasst1_tree", "oasst1_messages")


def detect_format(row: Row, where: str) -> str:
    """The name of the row's shape, told by its fields.

    Raises:
        UserError: no known shape has these fields.
    """
    pair, text = _pair(row), row.get("text")
    completion = row.get("completion")
    shapes = {
        "oasst1_tree": isinstance(row.get("prompt"), dict),
        "unnatural": isinstance(row.get("instances"), list),
        "instruction": "instruction" in row and "output" in row,
        "hh_rlhf": isinstance(row.get("chosen"), str),
        "self_instruct": pair == _PAIRS[1] and isinstance(completion, str) and completion.rstrip().endswith(_END_OF_TEXT),
        "prompt_response": pair is not None,
        "messages": "messages" in row or "conversations" in row,
        "oasst1_messages": all(name in row for name in ("message_id", "role", "text")),
        "chip2": isinstance(text, str) and transcripts.CHIP2_MARK.match(text) is not None,
        "guanaco_text": isinstance(text, str) and transcripts.GUANACO_MARK.search(text) is not None,
    }
    for shape, fits in shapes.items():
        if fits:
            return shape
    raise UserError(
        f"{where}: cannot tell the row's shape from its fields {fields_of(row)}; understood are instruction+output, prompt+response, "
        "prompt+completion, input+output, inputs+targets, messages, conversations, chosen, instances, an OASST1 tree or message, and text "
        "with '### Human:' or '<human>:'"
    )


def check_turns(conversation: Conversation, where: str) -> None:
    """Raises UserError unless user and assistant speak in turn, the user first, after at most one system message."""
    turns = conversation[1:] if conversation and conversation[0].role == "system" else conversation
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            place = number + 1 + len(conversation) - len(turns)
            raise UserError(
                f"{where}: user and assistant must speak in turn, but message {place} is by {message.role} where {expected} is due; "
                "correct or remove the row"
            )


@dataclass(frozen=True)
class RowParser:
    """From one row, or unit of ``gather``, to its conversations. It needs no other row, so that any process can do it.

    Attributes:
        format: the rows' shape, "auto" no more.
        spec: how to read it.
    """

    format: str
    spec: DatasetSpec

    def __call__(self, row: Row, where: str) -> tuple[list[Conversation], list[str]]:
        """The usable conversations, and a reason for each that is left out (or for the row, where it holds none).

        With ``compat: paper`` a conversation is the authors' source, as the user's message, and target, as the assistant's.

        Raises:
            UserError: the row is wrong; the line names it.
        """
        if oasst1.REFUSED in row:
            raise UserError(row[oasst1.REFUSED])
        conversations = self._as_in_paper(row, where) if self.spec.compat == "paper" else self._read(row, where)
        if not conversations:
            return [], ["no usable path in the tree" if self.format in _OASST1 else "no answer"]
        if self.spec.compat == "paper":
            return conversations, []
        reasons = [_unusable(conversation, where) for conversation in conversations]
        usable = [one for one, reason in zip(conversations, reasons, strict=True) if reason is None]
        return [_with_system(one, self.spec.system_prompt) for one in usable], [reason for reason in reasons if reason is not None]

    def _read(self, row: Row, where: str) -> list[Conversation]:
        if self.format in _OASST1:
            return oasst1_tree(row, where, self.spec.oasst1_paths, self.spec.languages)
        if self.format == "unnatural":
            return unnatural(row, where, self.spec.reformulations)
        return FORMATS[self.format](row, where)

    def _as_in_paper(self, row: Row, where: str) -> list[Conversation]:
        return [[Message("user", source), Message("assistant", target)] for source, target in self._pairs(row, where)]

    def _pairs(self, row: Row, where: str) -> list[paper.Pair]:
        if self.format in _OASST1:
            paths = oasst1.paths(_root(row, where), where, self.spec.oasst1_paths, self.spec.languages, whole=True)
            return [paper.conversation(path) for path in paths]
        if self.format == "unnatural":
            return paper.unnatural(_instances(row, where, self.spec.reformulations))
        if self.format in paper.SHAPES:
            return paper.SHAPES[self.format](row, where)
        return paper.pair(row, where, _PAIRS[1] if self.format == "self_instruct" else _pair(row) or _PAIRS[0])


def row_parser(spec: DatasetSpec, first: Row, where: str) -> RowParser:
    """The parser for rows like ``first``, which stands at ``where``.

    Raises:
        UserError: their shape is not known, or the specification does not suit it.
    """
    shape = detect_format(first, where) if spec.format == "auto" else cast(str, spec.format)
    if spec.languages is not None and shape not in _OASST1:
        raise UserError(
            f"data.dataset.languages works for {' and '.join(_OASST1)} rows only, but these are {shape}; set data.dataset.languages: null"
        )
    if spec.compat == "paper" and shape == "messages":
        raise UserError("data.dataset.compat paper needs a shape that the authors' code knew, got messages; set data.dataset.compat: fixed")
    return RowParser(shape, spec)


def gather(rows: Iterable[Located], parser: RowParser) -> Iterator[Located]:
    """The units that ``parser`` takes: the rows themselves, or for messages of one row each the trees that they make.

    What only other rows show to be wrong (an id that is there twice, a reply without its parent) is found here, and raised when the unit
    that is given for it is parsed.
    """
    if parser.format == "oasst1_messages":
        return oasst1.trees(rows)
    return oasst1.distinct(rows) if parser.format == "oasst1_tree" else iter(rows)


def _unusable(conversation: Conversation, where: str) -> str | None:
    """Why a conversation is left out; one that is wrong is an error."""
    check_turns(conversation, where)
    answers = [message for message in conversation if message.role == "assistant"]
    if not answers:
        return "no answer"
    return None if all(message.content.strip() for message in answers) else "empty answer"


def _with_system(conversation: Conversation, system_prompt: str | None) -> Conversation:
    if system_prompt is None or conversation[0].role == "system":
        return conversation
    return [Message("system", system_prompt), *conversation]
