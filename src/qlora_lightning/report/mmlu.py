"""One MMLU evaluation as its JSON file holds it, and which of several to show."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

CATEGORIES = ("STEM", "humanities", "social sciences", "other")
GUESSING = 0.25
"""Accuracy of guessing among four letters."""


class Score(NamedTuple):
    """A share of right answers with its 95 % interval, all from 0 to 1."""

    accuracy: float
    low: float
    high: float
    questions: int | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Score":
        """From a row with ``accuracy``, ``interval`` and ``questions``."""
        low, high = row["interval"]
        return cls(float(row["accuracy"]), float(low), float(high), row.get("questions"))


class Setting(NamedTuple):
    """How an evaluation asked: only evaluations that agree in this can be compared."""

    style: str | None
    shots: int | None
    split: str | None
    limit: int | None

    def __str__(self) -> str:
        limit = f"the first {self.limit} questions of a subject" if self.limit else "every question"
        return f"{self.split} split, {self.shots} shots, style {self.style}, {limit}"


class Evaluation(NamedTuple):
    """One evaluation."""

    step: int | None
    """Optimizer steps taken; None where it did not belong to a training."""
    setting: Setting
    questions: int
    macro: Score
    """Mean over subjects."""
    micro: float
    """Share of all questions."""
    categories: dict[str, Score]
    subjects: dict[str, Score]
    shortened: int
    """Questions whose shots did not fit."""
    unanswered: int
    """Questions that did not fit even alone; they count as wrong."""
    seconds: float | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Evaluation":
        """From the JSON document of an evaluation. KeyError, TypeError or ValueError tell that it is another document."""
        return cls(
            step=row.get("step"),
            setting=Setting(row.get("style"), row.get("shots"), row.get("split"), row.get("limit")),
            questions=int(row["questions"]),
            macro=Score.of({**row, "interval": row["accuracy_interval"]}),
            micro=float(row["accuracy_micro"]),
            categories={str(name): Score.of(one) for name, one in row["categories"].items()},
            subjects={str(name): Score.of(one) for name, one in row["subjects"].items()},
            shortened=int(row.get("shortened") or 0),
            unanswered=int(row.get("unanswered") or 0),
            seconds=row.get("seconds"),
        )


def headlines(runs: Sequence[Sequence[Evaluation]]) -> list[Evaluation | None]:
    """The evaluation that speaks for each run: the one after the most steps, of those over the most questions.

    Where all runs that were evaluated were once asked in the same way, only such evaluations count, so that they can be compared.
    """
    ways = [{(one.setting, one.questions) for one in evaluations} for evaluations in runs if evaluations]
    shared = set.intersection(*ways) if ways else set()
    chosen = [[one for one in evaluations if not shared or (one.setting, one.questions) in shared] for evaluations in runs]
    return [max(some, key=lambda one: (one.questions, -1 if one.step is None else one.step), default=None) for some in chosen]


def history(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations during training that can be compared, in the order of their steps: those of the commonest setting."""
    during = [one for one in evaluations if one.step is not None]
    if not during:
        return []
    (setting, _), *_ = Counter((one.setting, one.questions) for one in during).most_common(1)
    return sorted((one for one in during if (one.setting, one.questions) == setting), key=lambda one: one.step or 0)
