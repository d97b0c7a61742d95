"""MMLU's questions as token ids, in the authors' style or the reference harness's, and the tokens of the four letters.

Shapes: n tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu.questions import LETTERS, Problem, Question, paper_header, written

Style = Literal["paper", "lm_eval"]


@dataclass(frozen=True)
class Prompt:
    """One question as the model sees it."""

    ids: list[int]
    """Token ids [n]; what follows is one of the letters."""
    shots: int
    """Examples that are in it."""
    dropped: int
    """Examples that had to go because the model's context is too short."""
    fits: bool
    """Whether the question fits at all; where it does not, ``ids`` is empty and the question counts as unanswered."""


@dataclass(frozen=True)
class Letters:
    """How a tokenizer writes `` A`` to `` D`` behind ``Answer:``."""

    before: list[int]
    """Tokens that all four begin with (a blank of its own, in some tokenizers); they belong to the prompt."""
    ids: list[int]
    """The token that tells each from the others [4]."""
    text: str
    """The continuation for A, as text."""


def prompt_text(question: Question, style: Style, dropped: int = 0) -> str:
    """What stands before the letter.

    Args:
        question: The question.
        style: ``paper``: the QLoRA authors' prompt, that of MMLU's own code, with its two blanks after "about". ``lm_eval``:
            lm-evaluation-harness's, with one blank and the questions stripped.
        dropped: Leave out so many examples, from the front.
    """
    strip = style == "lm_eval"
    header = paper_header(question.subject)
    return "".join(
        [
            header.replace("about  ", "about ") if strip else header,
            *(f"{written(shot, strip)} {LETTERS[shot.answer]}\n\n" for shot in question.shots[dropped:]),
            written(question.problem, strip),
        ]
    )


class Prompter:
    """Writes questions as token ids that fit a model's context.

    BOS stands in front where the tokenizer itself puts one, as it does in the authors' code for LLaMA and in the harness.

    Args:
        tokenizer: The base model's.
        style: See ``prompt_text``.
        max_length: Tokens that the model takes at most, the letter not counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, style: Style, max_length: int) -> None:
        self._tokenizer, self._style, self._max_length = tokenizer, style, max_length
        probe = Question("probe", Problem("1 + 1 = ?", ("1", "2", "3", "4"), 1), ())
        self.letters = find_letters(tokenizer, prompt_text(probe, style))

    def prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        """The prompt of each question. Too long ones lose examples from the front, never a part of the question."""
        prompts: list[Prompt | None] = [None] * len(questions)
        left, dropped = list(range(len(questions))), 0
        while left:
            texts = [prompt_text(questions[number], self._style, dropped) for number in left]
            for number, ids in zip(left, self._encode(texts), strict=True):
                shots = len(questions[number].shots) - dropped
                if len(ids) <= self._max_length or shots <= 0:
                    fits = len(ids) <= self._max_length
                    prompts[number] = Prompt(ids if fits else [], shots, dropped, fits)
            left, dropped = [number for number in left if prompts[number] is None], dropped + 1
        return [prompt for prompt in prompts if prompt is not None]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        return [ids + self.letters.before for ids in encoded]


def find_letters(tokenizer: PreTrainedTokenizerFast, prompt: str) -> Letters:
    """The tokens of the letters behind ``prompt``: with a blank before them, as in the examples, else without one.

    Found by encoding the prompt with each letter behind it: the prompt's own tokens must stay as they are, and the letters must differ
    in one token, the last. To choose the letter with the highest logit is then to choose the likeliest continuation.

    Raises:
        UserError: the tokenizer does neither.
    """
    context: list[int] = tokenizer(prompt)["input_ids"]
    for blank in (" ", ""):
        whole: list[list[int]] = tokenizer([f"{prompt}{blank}{letter}" for letter in LETTERS])["input_ids"]
        behind = [ids[len(context) :] for ids in whole]
        kept = all(ids[: len(context)] == context for ids in whole)
        before = behind[0][:-1]
        if kept and len({ids[-1] for ids in behind if ids}) == len(LETTERS) and all(ids[:-1] == before for ids in behind):
            return Letters(before, [ids[-1] for ids in behind], f"{blank}A")
    raise UserError(
        "MMLU needs a tokenizer that tells the letters A to D apart by one token behind 'Answer:', this base's "
        f"{type(tokenizer).__name__} does not; evaluate another base, or use `qlora-lightning evaluate --tasks mmlu`"
    )
