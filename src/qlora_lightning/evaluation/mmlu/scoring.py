"""Score a model on MMLU: the letter with the highest logit behind each prompt, the examples of a subject computed once.

Plain functions: ``MMLUTest`` is made once from questions and a tokenizer, ``answers`` asks a model, ``scores`` adds up.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu.prompts import Prompt, Prompter, Style
from qlora_lightning.evaluation.mmlu.questions import Question
from qlora_lightning.evaluation.mmlu.scores import MMLUScores, score
from qlora_lightning.evaluation.prefix import Reader
from qlora_lightning.modeling.tokenizer import filler_id

Tick = Callable[[int, int], None]
"""Told how many questions are done, and of how many."""


@dataclass(frozen=True)
class Answers:
    """What a model chose."""

    choices: Tensor
    """The letter of each question, from 0; -1 where the question did not fit [Q] int64."""
    logits: Tensor
    """Of the four letters behind each question [Q, 4] fp32."""
    shared: bool
    """Whether the examples were computed once a subject."""


class MMLUTest:
    """MMLU's questions as one model's tokens.

    Args:
        questions: See ``mmlu_data.Exam``.
        tokenizer: The base model's.
        style: See ``mmlu_prompt.prompt_text``.
        max_length: Tokens that the model takes at most.
    """

    def __init__(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast, style: Style, max_length: int) -> None:
        self.questions, self.max_length = questions, max_length
        prompter = Prompter(tokenizer, style, max_length)
        self.letters = prompter.letters
        self.prompts: list[Prompt] = prompter.prompts(questions)
        self._filler = filler_id(tokenizer)

    def answers(
        self,
        model: Any,
        batch_tokens: int = 4096,
        share: bool = True,
        rank: int = 0,
        ranks: int = 1,
        tick: Tick = lambda done, of: None,
    ) -> Answers:
        """Ask ``model``, in the context that it computes in (autocast, for adapters in fp32). It is left as it was.

        Args:
            model: A causal language model of transformers, PEFT's around one too.
            batch_tokens: Tokens of a batch at most, shared ones not counted.
            share: Compute what the prompts of a subject share once, where the model allows it.
            rank: This process's number; it answers its part of the questions.
            ranks: Processes; what they give must be added up (see ``Answers`` of one rank: zeros for the others' questions).
            tick: Told how far this rank is.
        """
        reader = Reader(model, self.letters.ids, self._filler, batch_tokens)
        logits = torch.zeros(len(self.questions), len(self.letters.ids))
        groups = self._groups()
        mine, done = _part_of(groups, [len(self.prompts[group[0]].ids) for group in groups], rank, ranks), 0
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                shared = share and bool(groups) and reader.can_share([self.prompts[number].ids for number in max(groups, key=len)])
                total = sum(map(len, mine))
                tick(0, total)
                for group in mine if shared else [list(chain.from_iterable(mine))][: len(mine)]:
                    found = []
                    for numbers, values in reader.logits([self.prompts[number].ids for number in group], shared):
                        found.append(([group[number] for number in numbers], values))
                        done += len(numbers)
                        tick(done, total)
                    for places, values in found:  # read once a group: reading waits for the device
                        logits[places] = values.cpu()
        finally:
            model.train(was_training)
        return Answers(self._choices(logits), logits, shared)

    def merged(self, logits: Tensor, shared: bool) -> Answers:
        """The answers of all ranks, from the sum of their logits [Q, 4]."""
        return Answers(self._choices(logits), logits, shared)

    def scores(self, answers: Answers) -> MMLUScores:
        """The numbers."""
        right = [int(choice) == question.problem.answer for choice, question in zip(answers.choices, self.questions, strict=True)]
        unanswered = sum(not prompt.fits for prompt in self.prompts)
        shortened = [prompt.dropped > 0 for prompt in self.prompts]
        return score([question.subject for question in self.questions], right, shortened, unanswered)

    def _choices(self, logits: Tensor) -> Tensor:
        fits = torch.tensor([prompt.fits for prompt in self.prompts], dtype=torch.bool)
        return torch.where(fits, logits.argmax(dim=1), -1)

    def _groups(self) -> list[list[int]]:
        """Numbers of the questions whose prompts begin alike: the same subject and examples."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, (question, prompt) in enumerate(zip(self.questions, self.prompts, strict=True)):
            if prompt.fits:
                groups[question.subject, prompt.shots, question.shots].append(number)
        return list(groups.values())


def _part_of(groups: list[list[int]], lengths: list[int], rank: int, ranks: int) -> list[list[int]]:
    """The groups of one rank: the costliest first, each to the rank that has least to do. A group that is more than a rank's even share of
    all work is cut, so that the others need not wait for its rank."""
    loads, parts = [0] * ranks, [list[list[int]]() for _ in range(ranks)]
    even = sum(len(group) * length for group, length in zip(groups, lengths, strict=True)) / ranks
    pieces = [(piece, length) for group, length in zip(groups, lengths, strict=True) for piece in _pieces(group, ceil(even / length))]
    for piece, length in sorted(pieces, key=lambda pair: -len(pair[0]) * pair[1]):
        least = loads.index(min(loads))
        parts[least].append(piece)
        loads[least] += len(piece) * length
    return parts[rank]


def _pieces(group: list[int], most: int) -> list[list[int]]:
    return [group[start : start + most] for start in range(0, len(group), most)]


def context_length(positions: int | None, wanted: int | None) -> int:
    """The longest prompt in tokens: the model's positions, or less where that is wanted; 2,048 where neither is known.

    Raises:
        UserError: more is wanted.
    """
    most = positions or wanted or 2048
    if wanted is not None and wanted > most:
        raise UserError(f"mmlu.max_length must be at most {most}, the base model's positions, got {wanted}; lower it or leave it out")
    return wanted or most
