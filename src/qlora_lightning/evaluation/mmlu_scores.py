"""MMLU's numbers: accuracy by subject and category, macro and micro, each with a 95 % interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

from qlora_lightning.evaluation.mmlu_subjects import category_of

_Z = NormalDist().inv_cdf(0.975)


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
            *_share(sum(right[number] for number in numbers), len(numbers)),
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
        micro=Score(*_share(sum(right), len(right)), questions=len(right)),
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


def _share(right: int, questions: int) -> tuple[float, tuple[float, float]]:
    """The share of right answers and Wilson's interval (Wilson 1927), which stays in [0, 1] for few questions too."""
    share, weight = right / questions, 1 + _Z**2 / questions
    middle = (share + _Z**2 / (2 * questions)) / weight
    half = _Z / weight * sqrt(share * (1 - share) / questions + _Z**2 / (4 * questions**2))
    return share, (max(0.0, middle - half), min(1.0, middle + half))


def _mean(scores: Iterable[Score]) -> tuple[float, tuple[float, float]]:
    """The mean over subjects, and its interval by the normal approximation: the subjects' own variances add up."""
    parts = list(scores)
    mean = sum(one.accuracy for one in parts) / len(parts)
    variance = sum(one.accuracy * (1 - one.accuracy) / max(one.questions - 1, 1) for one in parts) / len(parts) ** 2
    half = _Z * sqrt(variance)
    return mean, (max(0.0, mean - half), min(1.0, mean + half))
