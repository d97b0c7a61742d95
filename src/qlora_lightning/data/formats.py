"""Row shapes: one plain function each, from a row's fields to its conversations. A new shape is one function and one line in ``FORMATS``.

A missing, null or non-text field is an error that names the row. An empty answer is not: real sets have a few; such rows are counted
and left out.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from qlora_lightning.errors import UserError

if TYPE_CHECKING:  # the specification names the templates, and these the messages
    from qlora_lightning.data.spec import DatasetSpec

Role = Literal["system", "user", "assistant"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Message:
    """What one side says once. ``context`` is an instruction's separate input; a template without a place for it appends it."""

    role: Role
    content: str
    context: str = ""


Conversation = list[Message]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_INPUT = ("noinput", "noinputneeded", "noinputrequired")  # as Alpaca's rows spell it, in many ways, once signs and blanks are gone
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("input", "output"))


def text_of(row: Row, name: str, where: str, may_be_empty: bool = False) -> str:
    """The text in one field of a row.

    Raises:
        UserError: it is missing, null, not text, empty where it may not be, or no valid Unicode.
    """
    if name not in row:
        raise UserError(f"{where}: the row needs a field {name!r}, found {_fields(row)}; add it, or name the set's data.dataset.format")
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


def _fields(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def instruction(row: Row, where: str) -> list[Conversation]:
    """Alpaca: ``instruction``, ``output`` and an optional ``input``, where ``<noinput>``, its variants and "" mean that there is none."""
    context = text_of(row, "input", where, may_be_empty=True) if row.get("input") is not None else ""
    if not context.strip() or re.sub(r"[\W_]+", "", context.lower()) in _NO_INPUT:
        context = ""
    ask = Message("user", text_of(row, "instruction", where), context)
    return [[ask, Message("assistant", text_of(row, "output", where, may_be_empty=True))]]


def prompt_response(row: Row, where: str) -> list[Conversation]:
    """A pair: ``prompt`` and ``response``, ``prompt`` and ``completion``, or ``input`` and ``output``."""
    ask, answer = next((pair for pair in _PAIRS if all(name in row for name in pair)), _PAIRS[0])
    return [[Message("user", text_of(row, ask, where)), Message("assistant", text_of(row, answer, where, may_be_empty=True))]]


def messages(row: Row, where: str) -> list[Conversation]:
    """A list ``messages`` of ``role`` and ``content``, or ``conversations`` of ``from`` and ``value`` (ShareGPT)."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f"{where}: the row needs a list 'messages' of role and content, found {_fields(row)}; correct it or name data.dataset.format"
        )
    return [[_turn(turn, f"{where}: message {number}") for number, turn in enumerate(turns, 1)]]


def _turn(turn: Row, where: str) -> Message:
    name, content = ("from", "value") if "from" in turn else ("role", "content")
    role = _ROLES.get(text_of(turn, name, where))
    if role is None:
        raise UserError(f"{where}: a role must be one of {', '.join(_ROLES)}, got {turn[name]!r}; correct or remove the row")
    return Message(role, text_of(turn, content, where, may_be_empty=role == "assistant"))


_GUANACO_MARK = re.compile(r"[ \n]{0,2}### (Human|Assistant):[ \n]?")


def guanaco_text(row: Row, where: str) -> list[Conversation]:
    """One ``text``: ``### Human: ...### Assistant: ...``, any number of turns, single blanks or line ends round the marks."""
    before, *parts = _GUANACO_MARK.split(text_of(row, "text", where))
    if not parts:
        raise UserError(
            f"{where}: field 'text' needs the marks '### Human:' and '### Assistant:', found neither; correct or remove the row"
        )
    conversation = [Message("system", before)] if before.strip() else []
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        if mark == "Human" and not content.strip():
            raise UserError(f"{where}: a '### Human:' turn must not be empty; correct or remove the row")
        conversation.append(Message("user" if mark == "Human" else "assistant", content))
    return [conversation]


def oasst1_tree(row: Row, where: str, paths: Literal["best", "all"] = "best", languages: list[str] | None = None) -> list[Conversation]:
    """An OASST1 message tree: the best-ranked path, or every path. A path ends with an assistant; deleted messages have no replies."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise UserError(f"{where}: the row needs a message tree 'prompt', found {_fields(row)}; correct it or name data.dataset.format")
    if not _usable(root, languages):
        return []
    return list(_paths(root, [], where, paths, languages))


def _usable(node: Row, languages: list[str] | None) -> bool:
    return not node.get("deleted") and (languages is None or node.get("lang") in languages)


def _paths(node: Row, before: Conversation, where: str, paths: str, languages: list[str] | None) -> Iterator[Conversation]:
    """Every longest path through ``node`` that ends with an assistant; for "best" through the best-ranked reply only."""
    path = [*before, _turn({"role": node.get("role"), "content": node.get("text")}, where)]
    replies = [reply for reply in node.get("replies") or [] if _usable(reply, languages)]
    if paths == "best":
        # Rank 0 is best. Replies without a rank were never compared: they come last, in the order of the file.
        replies = sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))[:1]
    found = False
    for reply in replies:
        for longer in _paths(reply, path, where, paths, languages):
            found = True
            yield longer
    if not found and path[-1].role == "assistant":
        yield path


FORMATS: dict[str, Callable[[Row, str], list[Conversation]]] = {
    "instruction": instruction,
    "prompt_response": prompt_response,
    "messages": messages,
    "guanaco_text": guanaco_text,
    "oasst1_tree": oasst1_tree,
}


def detect_format(row: Row, where: str) -> str:
    """The name of the row's shape, told by its fields.

    Raises:
        UserError: no known shape has these fields.
    """
    if "instruction" in row and "output" in row:
        return "instruction"
    if isinstance(row.get("prompt"), dict):
        return "oasst1_tree"
    if any(all(name in row for name in pair) for pair in _PAIRS):
        return "prompt_response"
    if "messages" in row or "conversations" in row:
        return "messages"
    if isinstance(row.get("text"), str) and _GUANACO_MARK.search(row["text"]):
        return "guanaco_text"
    raise UserError(
        f"{where}: cannot tell the row's shape from its fields {_fields(row)}; understood are instruction+output, prompt+response, "
        "prompt+completion, input+output, messages, conversations, an OASST1 tree, and text with '### Human:'"
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


def read_conversations(rows: Iterable[tuple[str, Row]], spec: "DatasetSpec", skipped: Counter[str]) -> Iterator[Conversation]:
    """The conversations of all rows, in order; ``rows`` gives (where it stands, fields). Counts in ``skipped`` what is left out and why."""
    parse: Callable[[Row, str], list[Conversation]] | None = None
    for where, row in rows:
        parse = parse or _parser(spec, row, where)
        conversations = parse(row, where)
        if not conversations:
            skipped["no usable path in the tree"] += 1
        for conversation in conversations:
            check_turns(conversation, where)
            if not any(message.role == "assistant" for message in conversation):
                skipped["no answer"] += 1
            elif any(message.role == "assistant" and not message.content.strip() for message in conversation):
                skipped["empty answer"] += 1
            else:
                yield _with_system(conversation, spec.system_prompt)


def _parser(spec: "DatasetSpec", row: Row, where: str) -> Callable[[Row, str], list[Conversation]]:
    name = detect_format(row, where) if spec.format == "auto" else cast(str, spec.format)
    if name == "oasst1_tree":
        return partial(oasst1_tree, paths=spec.oasst1_paths, languages=spec.languages)
    if spec.languages is not None:
        raise UserError(f"data.dataset.languages works for oasst1_tree rows only, but these are {name}; set data.dataset.languages: null")
    return FORMATS[name]


def _with_system(conversation: Conversation, system_prompt: str | None) -> Conversation:
    if system_prompt is None or conversation[0].role == "system":
        return conversation
    return [Message("system", system_prompt), *conversation]
