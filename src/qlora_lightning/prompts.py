"""Files of prompts: what each row asks, as a conversation that the model's own template can write."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.data.files import read_lines, read_rows
from qlora_lightning.data.formats import Conversation, Message, check_turns, messages
from qlora_lightning.data.rows import Row, text_of
from qlora_lightning.data.transcripts import guanaco_text
from qlora_lightning.errors import UserError

_FIRST_MARK = "### Human:"
_PREAMBLE = (  # the QLoRA authors' prompts open with it
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Prompt:
    """One question of a file."""

    row: Row
    """The row's own fields."""
    conversation: Conversation
    """What is asked; ends with a message of the user."""


def read_prompts(path: str | Path, system_prompt: str | None = None) -> Iterator[Prompt]:
    """The prompts of a file, in its order.

    Args:
        path: A .txt file of one prompt a line, or any file of rows that ``asked`` understands.
        system_prompt: Said before each conversation that brings no system message of its own.

    Raises:
        UserError: a row asks nothing, or the file cannot be read.
    """
    opening = [Message("system", system_prompt)] if system_prompt else []
    for row, conversation in _rows(path):
        yield Prompt(row, conversation if conversation[0].role == "system" else opening + conversation)


def _rows(path: str | Path) -> Iterator[tuple[Row, Conversation]]:
    if str(path).endswith(".txt"):
        for _, line in read_lines(path):
            yield {"prompt": line}, [Message("user", line)]
        return
    for where, row in read_rows(path):
        yield row, asked(row, where)


def asked(row: Row, where: str) -> Conversation:
    """The conversation that a row holds, without its last answer.

    In this order: ``messages`` or ``conversations``; a transcript of ``### Human:`` and ``### Assistant:`` turns in ``input``, ``text`` or
    ``prompt`` (the QLoRA authors' questions); a plain question in ``prompt``, ``instruction`` (and ``input``) or ``text``.

    Raises:
        UserError: there is none of these, or what there is does not end with a message of the user.
    """
    if row.get("messages", row.get("conversations")):
        return _unanswered(row, where)
    for field in ("input", "text", "prompt") if "instruction" not in row else ():
        if isinstance(text := row.get(field), str) and _is_transcript(text):
            return _transcript(text, where)
    for field in ("prompt", "instruction", "text"):
        if isinstance(text := row.get(field), str) and text.strip():
            return [Message("user", text_of(row, field, where), str(row.get("input") or "") if field == "instruction" else "")]
    raise UserError(f"{where}: a prompt needs a text in prompt, instruction, text or messages, found {', '.join(row) or 'nothing'}")


def _unanswered(row: Row, where: str) -> Conversation:
    (conversation,) = messages(row, where)
    check_turns(conversation, where)
    questions = conversation[:-1] if conversation[-1].role == "assistant" else conversation
    if questions[-1].role != "user":
        raise UserError(f"{where}: `messages` need one of the user to answer, found {questions[-1].role} alone; correct the row")
    return questions


def _is_transcript(text: str) -> bool:
    return text.removeprefix(_PREAMBLE).lstrip().startswith(_FIRST_MARK)


def _transcript(text: str, where: str) -> Conversation:
    """The turns, without the preamble: the model's own template and system prompt are what it was trained with."""
    (conversation,) = guanaco_text({"text": text.removeprefix(_PREAMBLE)}, where)
    if conversation[-1].role == "assistant" and not conversation[-1].content.strip():
        conversation.pop()  # the mark that asks for the answer
    check_turns(conversation, where)
    if conversation[-1].role != "user":
        raise UserError(
            f"{where}: a transcript to answer must end with a '{_FIRST_MARK}' turn (an empty '### Assistant:' may follow), "
            f"found the answer {conversation[-1].content.strip()[:40]!r}; cut it off"
        )
    return conversation
