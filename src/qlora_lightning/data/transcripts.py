"""Shapes that hold a whole conversation in one text, with a mark before each turn."""

import re

from qlora_lightning.data.rows import Conversation, Message, Role, Row, text_of
from qlora_lightning.errors import UserError

_HH_MARK = re.compile(r"\n\n(Human|Assistant):(?: |\Z)")
CHIP2_MARK = re.compile(r"(?:\A|\n)<(human|bot)>: ?")
GUANACO_MARK = re.compile(r"[ \n]{0,2}### (Human|Assistant):[ \n]?")


def hh_rlhf(row: Row, where: str) -> list[Conversation]:
    """The ``chosen`` transcript. Where one side speaks twice in a row, as in a few rows, that is one turn of two paragraphs."""
    joined: Conversation = []
    for message in _transcript(row, "chosen", _HH_MARK, "'\\n\\nHuman: ' and '\\n\\nAssistant: '", where):
        if joined and joined[-1].role == message.role:
            message = Message(message.role, f"{joined.pop().content}\n\n{message.content}".strip())
        joined.append(message)
    return [joined]


def chip2(row: Row, where: str) -> list[Conversation]:
    """One ``text`` of lines that begin with ``<human>:`` and ``<bot>:``, any number of turns."""
    return [_transcript(row, "text", CHIP2_MARK, "'<human>: ' and '\\n<bot>: '", where)]


def _transcript(row: Row, name: str, mark: re.Pattern[str], marks: str, where: str) -> Conversation:
    """What stands behind each mark, without the blanks round it."""
    before, *parts = mark.split(text_of(row, name, where))
    if not parts or before.strip():
        found = "none" if not parts else f"{before[:40]!r} before the first"
        raise UserError(f"{where}: field {name!r} must be turns with the marks {marks}, found {found}; correct or remove the row")
    conversation = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role: Role = "user" if speaker.lower() == "human" else "assistant"
        if role == "user" and not content.strip():
            raise UserError(f"{where}: a turn of {speaker} in field {name!r} must not be empty; correct or remove the row")
        conversation.append(Message(role, content.strip()))
    return conversation


def guanaco_text(row: Row, where: str) -> list[Conversation]:
    """One ``text``: ``### Human: ...### Assistant: ...``, any number of turns, single blanks or line ends round the marks."""
    before, *parts = GUANACO_MARK.split(text_of(row, "text", where))
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
