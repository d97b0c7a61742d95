"""The tokenizer's own chat template (Jinja), with true character spans.

Jinja gives text without saying who speaks where. So the template is rendered once for every sequence of roles with marks in place of the
messages, which shows its own words exactly; a conversation is written out from those, and must then equal what the template makes of it.

A template is a program that came with the base model. It runs in transformers' sandbox (no attribute of Python's, no file, no import), here
also within limits of time, memory and length, and without what would make it write something else each time.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from qlora_lightning.data.bounded import bounded
from qlora_lightning.data.formats import Conversation
from qlora_lightning.data.rendering import Rendering, Writer, special_tokens, whole_text
from qlora_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Roles = tuple[str, ...]
_DATE = "26 Jul 2024"  # Llama 3's template writes a date, today's if none is given: the same rows must give the same text every day
_SECONDS = 10.0  # a real template takes less than a millisecond
_BYTES = 1 << 30
_WORDS = 1_000_000  # characters that a template may add to the messages
_REFUSED = ("**", "| random", "| round", "lipsum")  # other words each time, or one call that may never end
_STRIPPED = [set(roles) for count in (0, 3, 1, 2) for roles in combinations(("system", "user", "assistant"), count)]


class _Answer(NamedTuple):
    """Where an answer is trained on: from ``lead`` characters before its text to ``tail`` characters behind it, end token included."""

    lead: int
    tail: int


class _Skeleton(NamedTuple):
    """The template's own words round m messages [m + 1], and the answers among them by their number."""

    literals: list[str]
    answers: dict[int, _Answer]


class ChatTemplateRenderer:
    """Renders with ``tokenizer.chat_template``; see ``Renderer``.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot write a question and its answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "template tokenizer needs a base model whose tokenizer brings a chat template, but this one has none; "
                "name a template with --data.dataset.template"
            )
        for source in _sources(tokenizer.chat_template):
            _check_source(source)
        self._tokenizer = tokenizer
        self._skeletons: dict[Roles, _Skeleton] = {}
        self._prompts: dict[Roles, _Skeleton] = {}
        tokens = (*special_tokens(tokenizer), tokenizer.bos_token, tokenizer.eos_token)
        self.control = tuple(dict.fromkeys(token for token in tokens if token))
        if self._literals(("user", "assistant"), False) != self._literals(("user", "assistant"), False):
            raise UserError("the tokenizer's chat template writes other words each time; name another with --data.dataset.template")
        answer = self._skeleton(("user", "assistant"))
        end = next(_tokens(answer.literals[2], self.control))[1]
        self.end_tokens = list(dict.fromkeys(token for token in (end, tokenizer.eos_token) if token))

    def render(self, conversation: Conversation) -> Rendering | None:
        text = self._apply(_plain(conversation), add_generation_prompt=False)
        skeleton = self._skeleton(tuple(message.role for message in conversation))
        return self._fill(conversation, skeleton.literals, skeleton.answers, text)

    def prompt(self, conversation: Conversation) -> Rendering:
        asked = conversation[:-1] if conversation and conversation[-1].role == "assistant" else conversation
        text = self._apply(_plain(asked), add_generation_prompt=True)
        skeleton = self._prompt(tuple(message.role for message in asked))
        rendering = self._fill(asked, skeleton.literals, skeleton.answers, text)
        if rendering is None:
            raise UserError("the tokenizer's chat template changes what a message says; use another --template")
        return rendering

    def _fill(self, conversation: Conversation, literals: list[str], answers: dict[int, _Answer], text: str) -> Rendering | None:
        """The template's words and the messages, provided that they make ``text``: as they are, or some roles' stripped."""
        for stripped in _STRIPPED:
            texts = [whole_text(m).strip() if m.role in stripped else whole_text(m) for m in conversation]
            rendering = self._write(texts, literals, answers)
            if rendering.text == text:
                return rendering
        return None

    def _write(self, texts: Sequence[str], literals: list[str], answers: dict[int, _Answer]) -> Rendering:
        writer = Writer(self.control)
        rendering, bos = writer.rendering, self._tokenizer.bos_token
        rendering.bos = bool(bos) and literals[0].startswith(bos) and sum(literal.count(bos) for literal in literals) == 1
        writer.literal(literals[0])
        for number, (text, literal) in enumerate(zip(texts, literals[1:], strict=True)):
            start = writer.length
            if number in answers:
                if not rendering.supervised:
                    rendering.header = start - len(literals[number])
                rendering.supervised.append((start - answers[number].lead, start + len(text) + answers[number].tail))
            writer.text(text)
            writer.literal(literal)
        return writer.finish()

    def _skeleton(self, roles: Roles) -> _Skeleton:
        if roles not in self._skeletons:
            self._skeletons[roles] = self._with_answers(roles, self._literals(roles, add_generation_prompt=False))
        return self._skeletons[roles]

    def _prompt(self, roles: Roles) -> _Skeleton:
        if roles not in self._prompts:
            self._prompts[roles] = self._with_answers(roles, self._literals(roles, add_generation_prompt=True))
        return self._prompts[roles]

    def _with_answers(self, roles: Roles, literals: list[str]) -> _Skeleton:
        return _Skeleton(literals, {n: self._answer(roles, n, literals) for n, role in enumerate(roles) if role == "assistant"})

    def _answer(self, roles: Roles, number: int, literals: list[str]) -> _Answer:
        """What the template writes before an answer beyond the prompt at inference, the model must write itself: it is trained on."""
        asked = self._prompt(roles[:number]).literals
        before = literals[number]
        if asked[:-1] != literals[:number] or not before.startswith(asked[-1]):
            raise UserError(
                f"the tokenizer's chat template asks for an answer with {asked[-1]!r} but has {before!r} before it in a conversation, "
                "so that training would not fit inference; name another with --data.dataset.template"
            )
        lead = len(before) - len(asked[-1])
        end = next(_tokens(literals[number + 1], self.control), None)
        if end is None:
            raise UserError(
                "the tokenizer's chat template ends an answer with no special token, so that a model trained with it would never stop; "
                "name another with --data.dataset.template"
            )
        return _Answer(lead, end[0] + len(end[1]))

    def _literals(self, roles: Roles, add_generation_prompt: bool) -> list[str]:
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        rest = self._apply([{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)], add_generation_prompt)
        literals = []
        for mark in marks:
            if rest.count(mark) != 1:
                raise UserError(f"the tokenizer's chat template does not write each of the messages {', '.join(roles)} once; name another")
            literal, rest = rest.split(mark)
            literals.append(literal)
        return [*literals, rest]

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        roles = ", ".join(message["role"] for message in messages)
        most = sum(len(message["content"]) for message in messages) + _WORDS
        try:
            with bounded(_SECONDS, _BYTES):
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE
                )
        except Exception as error:  # a template is a program of somebody else's
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(
                f"the tokenizer's chat template refuses the turns {roles} ({reason}); leave out the system message or name another template"
            ) from error
        if len(text) > most:
            raise UserError(
                f"the tokenizer's chat template may add {_WORDS:,} characters at most to the turns {roles}; name another template"
            )
        return str(text)


def _sources(templates: str | dict[str, str]) -> list[str]:
    """A tokenizer has one template, or several by name."""
    return [templates] if isinstance(templates, str) else list(templates.values())


def _check_source(source: str) -> None:
    """Raises UserError for a template that is broken or uses what ``_REFUSED`` names."""
    try:
        tokens = [value for _, kind, value in jinja2.Environment().lex(source) if kind not in ("whitespace", "data", "comment", "string")]
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the tokenizer's chat template is broken ({error}); name another with --data.dataset.template") from error
    for token, following in pairwise([*tokens, ""]):
        word = f"| {following}" if token == "|" else token
        if word in _REFUSED:
            raise UserError(
                f"the tokenizer's chat template uses {word!r}, which no template needs and a hostile one could; "
                "name another with --data.dataset.template"
            )


def _plain(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": whole_text(message)} for message in conversation]


def _tokens(text: str, control: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The control tokens in a template's words: where each begins, and what it is."""
    writer = Writer(control)
    writer.literal(text)
    yield from ((start, text[start:end]) for start, end in writer.rendering.control)
