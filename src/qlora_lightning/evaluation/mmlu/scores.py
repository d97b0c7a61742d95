"""MMLU's numbers: accuracy by subject and category, macro and micro, each with a 95 % interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_lightning.evaluation.intervals import Estimate, mean, share
from qlora_lightning.evaluation.mmlu.subjects import category_of


@dataclass(frozen=True)
class Score:
    """A share of right answers."""

    accuracy: float
    interval: tuple[float, float]
    """95 %, of what other questions of the same kind would give."""
    questions: int


@dataclass(frozen=True)
class SubjectScore(Score):
    """One subject's."""

    shortened: int
    """Questions whose prompt lost examples because it was too long."""


@dataclass(frozen=True)
class CategoryScore(Score):
    """A mean over the subjects of a category."""

    subjects: int


@dataclass(frozen=True)
class MMLUScores:
    """The result of one evaluation."""

    macro: Score
    """Mean over subjects, as the QLoRA paper gives it."""
    micro: Score
    """Over all questions, as the reference harness gives it."""
    subjects: dict[str, SubjectScore]
    categories: dict[str, CategoryScore]
    shortened: int
    """Questions whose prompt lost examples because it was too long."""
    unanswered: int
    """Questions that did not fit into the model's context even without examples; they count as wrong."""

    def metrics(self) -> dict[str, float]:
        """What is logged: mmlu/accuracy (macro), mmlu/accuracy_micro, and each category and subject."""
        parts = {name.replace(" ", "_").lower(): score for name, score in self.categories.items()} | self.subjects
        names = {"accuracy": self.macro.accuracy, "accuracy_micro": self.micro.accuracy}
        return {f"mmlu/{name}": value for name, value in (names | {name: part.accuracy for name, part in parts.items()}).items()}

    def document(self) -> dict[str, Any]:
        """All of it as plain values, as the JSON file holds it."""
        return {
            "accuracy": self.macro.accuracy,
            "accuracy_interval": list(self.macro.interval),
            "accuracy_micro": self.micro.accuracy,
            "accuracy_micro_interval": list(self.micro.interval),
            "questions": self.micro.questions,
            "shortened": self.shortened,
            "unanswered": self.unanswered,
            "categories": {name: asdict(score) for name, score in self.categories.items()},
            "subjects": {name: asdict(score) for name, score in self.subjects.items()},
        }


def score(subjects: Sequence[str], right: Sequence[bool], shortened: Sequence[bool], unanswered: int = 0) -> MMLUScores:
    """The numbers of an evaluation.

    Args:
        subjects: Of each question.
        right: Whether each was answered rightly.
        shortened: Whether each question's prompt lost examples.
        unanswered: Questions that did not fit.
    """
    names = sorted(set(subjects))
    places: dict[str, list[int]] = {name: [] for name in names}
    for number, name in enumerate(subjects):
        places[name].append(number)
    by_subject = {
        name: SubjectScore(
            *_numbers(share(sum(right[number] for number in numbers), len(numbers))),
            questions=len(numbers),
            shortened=sum(shortened[number] for number in numbers),
        )
        for name, numbers in places.items()
    }
    categories = {
        category: CategoryScore(*_mean(members), questions=sum(one.questions for one in members), subjects=len(members))
        for category, members in _by_category(by_subject).items()
    }
    return MMLUScores(
        macro=Score(*_mean(by_subject.values()), questions=len(right)),
        micro=Score(*_numbers(share(sum(right), len(right))), questions=len(right)),
        subjects=by_subject,
        categories=categories,
        shortened=sum(shortened),
        unanswered=unanswered,
    )


def _by_category(subjects: Mapping[str, SubjectScore]) -> dict[str, list[SubjectScore]]:
    found: dict[str, list[SubjectScore]] = {}
    for name, one in subjects.items():
        found.setdefault(category_of(name), []).append(one)
    return dict(sorted(found.items()))


def _mean(scores: Iterable[Score]) -> tuple[float, tuple[float, float]]:
    return _numbers(mean([Estimate(one.accuracy, *one.interval) for one in scores]))


def _numbers(found: Estimate) -> tuple[float, tuple[float, float]]:
    return found.value, (found.low, found.high)
