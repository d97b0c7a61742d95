"""How a conversation becomes text: one rendering that knows, to the character, who says what.

The spans of a rendering are the only source of labels: nothing is ever searched for in text or tokens afterwards.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.data.templates import TOKENIZER, Template, find_template
from qlora_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Rendering:
    """A conversation as text. All spans are [start, end) in characters of ``text``, in order."""

    text: str
    supervised: list[tuple[int, int]] = field(default_factory=list)
    """What the assistant says, each with its end token."""
    control: list[tuple[int, int]] = field(default_factory=list)
    """Control tokens that the template wrote; the same characters anywhere else are plain text."""
    header: int = 0
    """Where the words begin that end the first question and open its answer."""
    bos: bool = False
    """The text opens with BOS, which is no part of a turn."""
    joint: int | None = None
    """The text before and behind this character is tokenized apart (``compat: paper``)."""


class ConversationRenderer(Protocol):
    """Writes conversations out for training. Goes to worker processes, so that it can be pickled."""

    control: tuple[str, ...]
    """The tokens that only the style may write."""

    def render(self, conversation: Conversation) -> Rendering | None:
        """The whole conversation. None: the style changes what a message says, so that no span of it would be true."""
        ...


class Renderer(ConversationRenderer, Protocol):
    """One style for one tokenizer, for training and for inference."""

    end_tokens: list[str]
    """At which generation stops: the style's end of an answer, and the tokenizer's eos."""

    def prompt(self, conversation: Conversation) -> Rendering:
        """What asks for the conversation's last answer: everything before it, then the mark that opens it.

        Raises:
            UserError: the style cannot write the conversation.
        """
        ...


class Writer:
    """Collects text. Control tokens are looked for in a style's own words only, never in a message."""

    def __init__(self, control: Iterable[str]) -> None:
        self.rendering = Rendering("")
        self.length = 0
        self._parts: list[str] = []
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")

    def text(self, text: str) -> None:
        """Words of a message."""
        self._parts.append(text)
        self.length += len(text)

    def literal(self, text: str) -> None:
        """Words of the style."""
        self.rendering.control += [(self.length + m.start(), self.length + m.end()) for m in self._control.finditer(text)]
        self.text(text)

    def fill(self, pattern: str, **texts: str) -> int:
        """A style's words with messages at their places; gives where the last message ends."""
        end = self.length
        for n, part in enumerate(re.split(r"\{(content|context|system|eos)\}", pattern)):
            if n % 2 and part != "eos":
                self.text(texts[part])
                end = self.length
            else:
                self.literal(texts[part] if n % 2 else part)
        return end

    def finish(self) -> Rendering:
        """The rendering, with all text in it."""
        self.rendering.text = "".join(self._parts)
        return self.rendering


class TemplateRenderer:
    """A ``Template`` for a tokenizer: BOS once, an optional system message, then turns.

    Args:
        template: the style.
        bos: the tokenizer's BOS; not written where the template itself opens turns with that token (ChatML on SmolLM2).
        eos: the tokenizer's EOS: ends answers where the template has no end token of its own.
        special: the tokenizer's special tokens.
    """

    def __init__(self, template: Template, bos: str | None, eos: str | None, special: Iterable[str] = ()) -> None:
        end = template.end or eos
        assert end is not None, "load_renderer checks it"
        self._template, self._end, self._eos = template, end, eos or ""
        self._bos = bos if bos and bos not in template.control else ""
        self.end_tokens = list(dict.fromkeys(token for token in (end, eos) if token))
        self.control = tuple(dict.fromkeys(token for token in (*template.control, bos, end, eos, *special) if token))

    def render(self, conversation: Conversation) -> Rendering:
        return self._write(conversation).finish()

    def prompt(self, conversation: Conversation) -> Rendering:
        asked = conversation[:-1] if conversation and conversation[-1].role == "assistant" else conversation
        writer = self._write(asked)
        writer.literal(self._template.header)
        return writer.finish()

    def _write(self, conversation: Conversation) -> Writer:
        writer = Writer(self.control)
        writer.literal(self._bos)
        writer.rendering.bos = bool(self._bos)
        system = self._open(writer, conversation)
        for message in conversation:
            if message.role == "user":
                self._ask(writer, message, system)
                system = None
            elif message.role == "assistant":
                self._answer(writer, message)
        return writer

    def _open(self, writer: Writer, conversation: Conversation) -> str | None:
        """Writes what comes before the turns; gives a system message that belongs into the first of them."""
        template = self._template
        if conversation and conversation[0].role == "system":
            if template.user_with_system is not None:
                return conversation[0].content
            writer.fill(template.system, content=conversation[0].content, eos=self._eos)
        elif template.preamble_with_context and any(message.context for message in conversation[:1]):
            writer.literal(template.preamble_with_context)
        else:
            writer.literal(template.preamble)
        return None

    def _ask(self, writer: Writer, message: Message, system: str | None) -> None:
        template = self._template
        if message.context and template.user_with_context:
            end = writer.fill(template.user_with_context, content=message.content, context=message.context, eos=self._eos)
        elif system is not None and template.user_with_system is not None:
            end = writer.fill(template.user_with_system, content=whole_text(message), system=system, eos=self._eos)
        else:
            end = writer.fill(template.user, content=whole_text(message), eos=self._eos)
        if not writer.rendering.supervised:
            writer.rendering.header = end

    def _answer(self, writer: Writer, message: Message) -> None:
        writer.literal(self._template.header)
        start = writer.length
        writer.text(self._template.lead + message.content)
        writer.literal(self._end)
        writer.rendering.supervised.append((start, writer.length))
        writer.literal(self._template.after)


class PaperRenderer:
    """Source and target as the QLoRA authors' code joined them: BOS + source, then target + EOS, each tokenized by itself.

    Args:
        tokenizer: whose BOS (where it has one) and EOS these are.

    Raises:
        UserError: it has no EOS.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token is None:
            raise UserError("compat: paper ends every row with the tokenizer's eos token, but it has none; use compat: fixed")
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token
        self.control = tuple(dict.fromkeys(token for token in (self._bos, self._eos, *special_tokens(tokenizer)) if token))

    def render(self, conversation: Conversation) -> Rendering:
        source, target = (message.content for message in conversation)
        writer = Writer(self.control)
        writer.literal(self._bos)
        writer.text(source)
        start = writer.length
        writer.text(target)
        writer.literal(self._eos)
        rendering = writer.finish()
        rendering.supervised, rendering.header, rendering.joint, rendering.bos = [(start, writer.length)], start, start, bool(self._bos)
        return rendering


def whole_text(message: Message) -> str:
    """A message with its separate input behind it."""
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def load_renderer(name: str, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """The style of that name for a tokenizer.

    Raises:
        UserError: there is no such style, or the tokenizer lacks a token that it writes or a chat template of its own.
    """
    template = find_template(name)
    if template is None:
        from qlora_lightning.data.chat_template import ChatTemplateRenderer

        return ChatTemplateRenderer(tokenizer)
    if template.end is None and tokenizer.eos_token is None:
        raise UserError(
            f"template {name} ends answers with the tokenizer's eos token, but it has none; use another base or template {TOKENIZER}"
        )
    _check_control(name, template.control, tokenizer)
    return TemplateRenderer(template, tokenizer.bos_token, tokenizer.eos_token, special_tokens(tokenizer))


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokens that a tokenizer treats as special wherever they are spelled, but for the one that it writes for unknown characters."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", tokenizer.unk_token) if tokenizer.is_fast else None
    return [token for token in special if token != unknown]


def _check_control(name: str, control: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> None:
    vocabulary = tokenizer.get_vocab() if control else {}
    for token in control:
        if token not in vocabulary or tokenizer.encode(token, add_special_tokens=False) != [vocabulary[token]]:
            raise UserError(
                f"template {name} needs the token {token}, which the base model's tokenizer does not have; "
                f"use a base model trained with it or set --data.dataset.template guanaco (or {TOKENIZER}, where it brings a chat template)"
            )
