"""Elo ratings: the mean of the final ratings over many random orders of the matches, with an interval.

All orders are played side by side: one step of the loop plays the n-th match of every order. A match is one of few kinds (two systems
and an outcome), so that an order is a row of small integers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qlora_lightning.evaluation.tournament.matches import Floats, Ints, Matches

START = 1000.0  # QLoRA paper, section 5.2
SCALE = 400.0  # points by which the odds of a win grow tenfold (Elo's own)
RESAMPLES = 250
"""Samples of the questions that an interval is made from."""
ORDERS_EACH = 20
"""Orders that all of them are played in."""
_SIDE_BY_SIDE = 1000  # orders; 39 MB for the paper's 38,544 matches
_STEPS = 64  # looked up at once
Z = 1.959964  # 97.5 % quantile of the normal distribution

Orders = NDArray[np.unsignedinteger[Any]]
_Number = TypeVar("_Number", bound=np.integer[Any])


@dataclass(frozen=True)
class Elo:
    """Ratings of the systems of some matches, in their order.

    Attributes:
        rating: [S] mean over the orders.
        error: [S] standard error of that mean: of the choice of questions, and of the orders being finitely many.
    """

    rating: Floats
    error: Floats

    @property
    def low(self) -> Floats:
        """[S] lower end of the 95 % interval."""
        return self.rating - Z * self.error

    @property
    def high(self) -> Floats:
        """[S] its upper end."""
        return self.rating + Z * self.error


def orders_played(orderings: int) -> int:
    """How many orders ``elo`` plays in all, those for the interval included."""
    return orderings + RESAMPLES * ORDERS_EACH


def elo(matches: Matches, k: float, orderings: int, seed: int, advance: Callable[[int], None] = lambda _: None) -> Elo:
    """Rate the systems.

    The rating is the paper's: every match once, in random order, from 1000 points each, and the mean over the orders. The interval says
    how far it may be off because the questions are a sample: whole questions are drawn anew with replacement (verdicts on one question
    share its answers, so they are no independent matches), 250 times, and each sample is played in the same 20 orders. As the orders are
    the same, their luck hardly widens the spread of the 250 means: by 1 % to 6 % on the paper's verdicts. To its variance is added that
    of the rating over the orders that were played.

    Args:
        matches: to be played.
        k: points that a match moves at most.
        orderings: random orders of the rating.
        seed: of orders and samples.
        advance: told of orders as they are done.
    """
    kinds, codes = _kinds(matches)
    generator = np.random.default_rng(seed)
    total = np.zeros(len(matches.systems))
    for start in range(0, orderings, _SIDE_BY_SIDE):
        rows = min(_SIDE_BY_SIDE, orderings - start)
        total += kinds.play(_shuffled(codes, rows, generator), k).sum(0)
        advance(rows)
    of_questions, of_orders = _variances(matches.question, codes, kinds, k, generator, advance)
    return Elo(total / orderings, np.sqrt(of_questions + of_orders / orderings))


@dataclass(frozen=True)
class _Kinds:
    """The kinds of match there are; the last is a match that changes nothing, to fill up rows. S: systems, O: orders, M: matches."""

    systems: int
    first: Ints
    second: Ints
    share: Floats

    @np.errstate(over="ignore")  # who is expected to win with probability 1 / inf does not
    def play(self, orders: Orders, k: float) -> Floats:
        """[O, S] final ratings, of [O, M] kinds of match in the order in which they are played."""
        count, matches = orders.shape
        unit = np.log(10) / SCALE  # ratings are kept in units of the logistic function
        rating = np.zeros(self.systems * count)
        own, other, change = np.empty(count), np.empty(count), np.empty(count)
        column = np.arange(count)
        first, second = self.first * count, self.second * count  # where a system's ratings begin
        for start in range(0, matches, _STEPS):
            block = np.ascontiguousarray(orders[:, start : start + _STEPS].T)
            for a, b, won in zip(first[block] + column, second[block] + column, self.share[block], strict=True):
                np.take(rating, a, out=own, mode="clip")  # the other mode would copy through a buffer
                np.take(rating, b, out=other, mode="clip")
                np.subtract(other, own, out=change)
                np.exp(change, out=change)
                change += 1
                np.divide(1, change, out=change)  # what the first was expected to win
                np.subtract(won, change, out=change)
                change *= k * unit
                own += change
                other -= change
                rating[a] = own
                rating[b] = other
        return START + rating.reshape(self.systems, count).T / unit


def _kinds(matches: Matches) -> tuple[_Kinds, Orders]:
    """The kinds of match, and the [M] kind of each match."""
    triples = np.stack([matches.first, matches.second, (2 * matches.share).astype(np.int64)], 1)
    kinds, codes = np.unique(triples, axis=0, return_inverse=True)
    first, second, doubled = np.vstack([kinds, [0, 0, 1]]).T
    small = np.uint8 if len(first) <= 256 else np.uint16
    return _Kinds(len(matches.systems), first, second, doubled / 2), codes.reshape(-1).astype(small)


def _shuffled(row: NDArray[_Number], orders: int, generator: np.random.Generator) -> NDArray[_Number]:
    """[orders, M] the row in random orders. ``Generator.permuted`` would take half as long again for all of them together."""
    shuffled = np.empty((orders, len(row)), row.dtype)
    for order in shuffled:
        order[:] = row
        generator.shuffle(order)
    return shuffled


def _variances(
    question: Ints, codes: Orders, kinds: _Kinds, k: float, generator: np.random.Generator, advance: Callable[[int], None]
) -> tuple[Floats, Floats]:
    """[S] variance of the mean rating over samples of the questions, and [S] variance of one order's ratings."""
    samples = _samples(question, codes, generator)
    orders = _shuffled(np.arange(samples.shape[1]), ORDERS_EACH, generator)
    final = np.empty((RESAMPLES, ORDERS_EACH, kinds.systems))
    together = _SIDE_BY_SIDE // ORDERS_EACH
    for start in range(0, RESAMPLES, together):
        rows = samples[start : start + together, orders].reshape(-1, samples.shape[1])
        final[start : start + together] = kinds.play(rows, k).reshape(-1, ORDERS_EACH, kinds.systems)
        advance(len(rows))
    return final.mean(1).var(0, ddof=1), final.var(1, ddof=1).mean(0)


def _samples(question: Ints, codes: Orders, generator: np.random.Generator) -> Orders:
    """[RESAMPLES, M'] kinds of the matches of as many questions, drawn with replacement.

    Each kind has the same columns in every row, as many as the row with the most of it needs; where a row has fewer, idle matches fill
    up. So one order of the columns is nearly the same order for all samples, and its luck falls out of their differences.
    """
    questions, idle = int(question.max()) + 1, int(codes.max()) + 1
    table = np.zeros((questions, idle), np.int64)
    np.add.at(table, (question, codes), 1)
    counts = generator.multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES) @ table
    most = counts.max(0)
    kind = np.repeat(np.arange(idle), most)
    place = np.arange(len(kind)) - np.repeat(most.cumsum() - most, most)
    return np.where(place < counts[:, kind], kind, idle).astype(codes.dtype)
