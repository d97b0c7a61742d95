"""Verdicts as matches between systems, and what can be counted of them: who beats whom, and how much the order of the answers matters."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qlora_lightning.evaluation.tournament.verdicts import Verdict

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Matches:
    """One match a parsed verdict: the two orders of a pair are two matches. M: matches, S: systems.

    Attributes:
        systems: their names, sorted.
        first: [M] index of the system whose answer stood first.
        second: [M] index of the other.
        share: [M] the first's share of the win: 1, 0.5 or 0.
        question: [M] index of the question, from 0.
    """

    systems: list[str]
    first: Ints
    second: Ints
    share: Floats
    question: Ints

    def __len__(self) -> int:
        return len(self.share)

    @property
    def questions(self) -> int:
        """How many there are."""
        return int(self.question.max()) + 1

    @cached_property
    def wins(self) -> Floats:
        """[S, S] wins of the row's system over the column's, ties as half a win."""
        table = np.zeros((len(self.systems),) * 2)
        np.add.at(table, (self.first, self.second), self.share)
        np.add.at(table, (self.second, self.first), 1 - self.share)
        return table

    @property
    def met(self) -> Floats:
        """[S, S] matches between two systems."""
        return self.wins + self.wins.T

    @property
    def win_rates(self) -> Floats:
        """[S, S] share of the wins of the row's system over the column's, nan where they never met."""
        with np.errstate(invalid="ignore"):
            return self.wins / self.met


def comparisons(verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts that say which answer is better: the pairwise ones, or the relative ones where none of those was parsed."""
    pairwise = [verdict for verdict in verdicts if verdict.kind == "pairwise"]
    parsed = any(verdict.score is not None for verdict in pairwise)
    return pairwise if parsed else [verdict for verdict in verdicts if verdict.kind == "relative"]


def matches_of(verdicts: list[Verdict]) -> Matches:
    """The matches of verdicts, in their order; those that could not be parsed are left out."""
    parsed = [(verdict, share) for verdict in verdicts if (share := verdict.share) is not None]
    systems = sorted({name for verdict, _ in parsed for name in verdict.pair})
    place = {name: index for index, name in enumerate(systems)}
    questions: dict[str, int] = {}
    return Matches(
        systems,
        np.array([place[verdict.first] for verdict, _ in parsed]),
        np.array([place[verdict.second] for verdict, _ in parsed]),
        np.array([share for _, share in parsed]),
        np.array([questions.setdefault(verdict.question, len(questions)) for verdict, _ in parsed]),
    )


@dataclass(frozen=True)
class OrderBias:
    """How often the answer that stood first won, and how often a judge stayed with its verdict when the answers changed places.

    Attributes:
        first_wins: share of the decisive verdicts that the first answer won; 0.5 is without bias; None without a decisive one.
        decisive: verdicts that are no tie.
        ties: the others.
        both_orders: pairs of answers that one judge saw in both orders.
        same_verdict: how many of them got the same verdict twice.
        first_twice: how many were won by the first answer both times.
        second_twice: and by the second.
    """

    first_wins: float | None
    decisive: int
    ties: int
    both_orders: int
    same_verdict: int
    first_twice: int
    second_twice: int


def order_bias(verdicts: list[Verdict]) -> OrderBias:
    """Count it over the verdicts that were parsed."""
    shares = [share for verdict in verdicts if (share := verdict.share) is not None]
    firsts, seconds = shares.count(1.0), shares.count(0.0)
    decisive = firsts + seconds
    seen = {(one.judge, one.question, one.first, one.second): share for one in verdicts if (share := one.share) is not None}
    twice = [
        (share, again)
        for (judge, question, first, second), share in seen.items()
        if first < second and (again := seen.get((judge, question, second, first))) is not None
    ]
    return OrderBias(
        firsts / decisive if decisive else None,
        decisive,
        len(shares) - decisive,
        len(twice),
        sum(share == 1 - again for share, again in twice),
        twice.count((1.0, 1.0)),
        twice.count((0.0, 0.0)),
    )
