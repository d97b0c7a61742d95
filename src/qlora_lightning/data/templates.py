"""How a conversation becomes text. Templates are data; one function renders them all and knows, to the character, who says what.

The spans it returns are the only source of labels: nothing is ever searched for in text or tokens afterwards.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.errors import UserError


@dataclass(frozen=True)
class Template:
    """One prompt style. ``{content}`` and ``{context}`` stand for a message's text; ``end=None`` means the tokenizer's eos."""

    system: str
    user: str
    header: str
    """What opens an answer: the prompt at inference ends with it."""
    lead: str = ""
    """What the answer's text begins with. It belongs to the answer: most tokenizers join a blank to the word after it, so that a prompt
    with a blank at its end is followed at inference by tokens that training has never shown."""
    end: str | None = None
    """The token that ends an answer."""
    after: str = ""
    """What follows an ended answer; not trained on."""
    preamble: str = ""
    """In place of a system message, where the conversation has none."""
    user_with_context: str | None = None
    preamble_with_context: str | None = None
    control: tuple[str, ...] = ()
    """Tokens of this template that the tokenizer must know as single tokens."""


_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"

TEMPLATES: dict[str, Template] = {
    # The two prompts of Stanford Alpaca, which the QLoRA paper took over. There the prompt ends in "### Response: " with the blank;
    # here the text is the same, but the blank opens the answer (see ``Template.lead``).
    "alpaca": Template(
        system="{content}\n\n",
        preamble=f"{_ALPACA_TASK}. {_ALPACA_REQUEST}",
        preamble_with_context=f"{_ALPACA_TASK}, paired with an input that provides further context. {_ALPACA_REQUEST}",
        user="### Instruction:\n{content}\n\n",
        user_with_context="### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
        header="### Response:",
        lead=" ",
        after="\n\n",
    ),
    # The text form in which the QLoRA authors published their OASST1 subset. Theirs has one eos at the very end; here every answer ends
    # with one, so that the model learns to hand the turn back.
    "guanaco": Template(system="{content}\n", user="### Human: {content}", header="### Assistant:", lead=" "),
    # Nothing but the texts: for sets whose rows bring their own separators.
    "plain": Template(system="{content}\n", user="{content}", header=""),
    "chatml": Template(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        header="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        control=("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass
class Rendering:
    """A conversation as text. All spans are [start, end) in characters of ``text``, in order."""

    text: str
    supervised: list[tuple[int, int]] = field(default_factory=list)
    """What the assistant says, each with its end token."""
    control: list[tuple[int, int]] = field(default_factory=list)
    """Control tokens that the template wrote; the same characters anywhere else are plain text."""
    header: int = 0
    """Where the mark that opens the first answer begins."""


class _Writer:
    """Collects text. Control tokens are looked for in a template's own words only, never in a message."""

    def __init__(self, control: Sequence[str]) -> None:
        self.rendering = Rendering("")
        self.length = 0
        self._parts: list[str] = []
        self._control = re.compile("|".join(map(re.escape, control)))

    def text(self, text: str) -> None:
        self._parts.append(text)
        self.length += len(text)

    def literal(self, text: str) -> None:
        self.rendering.control += [(self.length + m.start(), self.length + m.end()) for m in self._control.finditer(text)]
        self.text(text)

    def fill(self, pattern: str, content: str, context: str = "") -> None:
        for part in re.split(r"(\{content\}|\{context\})", pattern):
            match part:
                case "{content}":
                    self.text(content)
                case "{context}":
                    self.text(context)
                case _:
                    self.literal(part)

    def finish(self) -> Rendering:
        self.rendering.text = "".join(self._parts)
        return self.rendering


def render(
    messages: Sequence[Message], template: Template, bos_token: str | None, eos_token: str | None, add_generation_prompt: bool = False
) -> Rendering:
    """Writes out a conversation: BOS once, an optional system message, then turns.

    Args:
        messages: an optional system message, then user and assistant in turn.
        template: the style.
        bos_token: written at the very beginning; not again where the template itself opens with that token.
        eos_token: ends answers where the template has no end token of its own.
        add_generation_prompt: ends with the mark that opens an answer, for the model to go on from.
    """
    end = template.end or eos_token
    assert end is not None, "check_template first"
    writer = _Writer(list(dict.fromkeys(token for token in (*template.control, bos_token, end) if token)))
    if bos_token and bos_token not in template.control:
        writer.literal(bos_token)
    _open(writer, messages, template)
    for message in messages:
        if message.role == "user":
            _ask(writer, message, template)
        elif message.role == "assistant":
            _answer(writer, message, template, end)
    if add_generation_prompt:
        _mark(writer, template)
    return writer.finish()


def _open(writer: _Writer, messages: Sequence[Message], template: Template) -> None:
    if messages and messages[0].role == "system":
        writer.fill(template.system, messages[0].content)
    elif template.preamble_with_context and any(m.context for m in messages[:1]):
        writer.literal(template.preamble_with_context)
    else:
        writer.literal(template.preamble)


def _ask(writer: _Writer, message: Message, template: Template) -> None:
    if message.context and template.user_with_context:
        writer.fill(template.user_with_context, message.content, message.context)
    else:
        writer.fill(template.user, f"{message.content}\n\n{message.context}" if message.context else message.content)


def _mark(writer: _Writer, template: Template) -> None:
    if not writer.rendering.supervised:
        writer.rendering.header = writer.length
    writer.literal(template.header)


def _answer(writer: _Writer, message: Message, template: Template, end: str) -> None:
    _mark(writer, template)
    start = writer.length
    writer.text(template.lead + message.content)
    writer.literal(end)
    writer.rendering.supervised.append((start, writer.length))
    writer.literal(template.after)


def render_prompt(conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """What asks for the conversation's last answer: everything before it, then the mark that opens it. BOS is in it."""
    asked = conversation[:-1] if conversation and conversation[-1].role == "assistant" else conversation
    return render(asked, template, tokenizer.bos_token, tokenizer.eos_token, add_generation_prompt=True)


def end_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens at which generation stops: the template's end of an answer, and the tokenizer's eos."""
    return list(dict.fromkeys(token for token in (template.end, tokenizer.eos_token) if token))


def find_template(name: str, option: str = "template") -> Template:
    """The template of that name; ``option`` is where the user wrote it.

    Raises:
        UserError: there is none; the line names all and the nearest.
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)[0]
        raise UserError(f"{option} must be one of {', '.join(sorted(TEMPLATES))}; got {name!r}, nearest is {near}")
    return TEMPLATES[name]


def check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of that name, once it is known to work with the tokenizer.

    Raises:
        UserError: there is no such template, or a token that it writes is not one token for this tokenizer.
    """
    template = find_template(name)
    if template.end is None and tokenizer.eos_token is None:
        raise UserError(
            f"template {name} ends answers with the tokenizer's eos token, but it has none; use another base or template chatml"
        )
    vocabulary = tokenizer.get_vocab() if template.control else {}
    for token in template.control:
        if token not in vocabulary or tokenizer.encode(token, add_special_tokens=False) != [vocabulary[token]]:
            raise UserError(
                f"template {name} needs the token {token}, which the base model's tokenizer does not have; "
                "use a base model trained with it or set --data.dataset.template guanaco"
            )
    return template
