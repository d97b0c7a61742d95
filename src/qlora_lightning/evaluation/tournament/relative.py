"""How well systems score next to a reference: the paper's "% of ChatGPT"."""

from dataclasses import dataclass

import numpy as np

from qlora_lightning.evaluation.tournament.matches import Floats
from qlora_lightning.evaluation.tournament.verdicts import Verdict

_SAMPLES = 2000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Percent:
    """A system's scores next to the reference's, in %.

    Attributes:
        name: of the system.
        percent: sum of its scores / sum of the reference's over the same verdicts, both orders together.
        low: lower end of the 95 % interval, over questions drawn anew.
        high: its upper end.
        shown_first: the same, of the verdicts that showed the system first; None without one.
        shown_second: of those that showed the reference first.
        verdicts: that were parsed.
        unparsed: the others.
    """

    name: str
    percent: float
    low: float
    high: float
    shown_first: float | None
    shown_second: float | None
    verdicts: int
    unparsed: int


def percents(verdicts: list[Verdict], reference: str, seed: int) -> list[Percent]:
    """Every system that was scored next to ``reference``, the best first."""
    relative = [verdict for verdict in verdicts if verdict.kind == "relative" and reference in verdict.pair]
    systems = {name for verdict in relative for name in verdict.pair} - {reference}
    found = [_percent(name, [verdict for verdict in relative if name in verdict.pair], seed) for name in sorted(systems)]
    return sorted((one for one in found if one is not None), key=lambda one: -one.percent)


def _percent(name: str, verdicts: list[Verdict], seed: int) -> Percent | None:
    """None where no score is above 0 to divide by."""
    parsed = [(verdict, verdict.score) for verdict in verdicts if isinstance(verdict.score, tuple)]
    first = np.array([verdict.first == name for verdict, _ in parsed], bool)
    scores = np.array([score if verdict.first == name else score[::-1] for verdict, score in parsed]).reshape(-1, 2)
    percent = _quotient(scores)
    if percent is None:
        return None
    low, high = _interval(scores, [verdict.question for verdict, _ in parsed], seed)
    unparsed = len(verdicts) - len(parsed)
    return Percent(name, percent, low, high, _quotient(scores[first]), _quotient(scores[~first]), len(parsed), unparsed)


def _quotient(scores: Floats) -> float | None:
    own, reference = scores.sum(0)
    return float(100 * own / reference) if reference else None


def _interval(scores: Floats, questions: list[str], seed: int) -> tuple[float, float]:
    """2.5 % and 97.5 % quantile over samples of the questions, drawn with replacement."""
    _, index = np.unique(questions, return_inverse=True)
    count = int(index.max()) + 1
    sums = np.zeros((count, 2))
    np.add.at(sums, index, scores)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_SAMPLES) @ sums
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(100 * drawn[:, 0] / drawn[:, 1], _INTERVAL)
    return float(low), float(high)
