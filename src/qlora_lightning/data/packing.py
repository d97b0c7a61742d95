"""Packing: the examples of one optimizer step laid out in as few rows of a token budget as best-fit decreasing finds.

Plain functions of the lengths: nothing is random, so that a plan stays what (seed, epoch) makes it.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
import numpy.typing as npt

from qlora_lightning.errors import UserError

Lengths = npt.NDArray[np.int64]
Row = tuple[int, ...]
"""The examples of one row, by index."""


def pack_step(step: Sequence[int], lengths: Lengths, budget: int, parts: int) -> list[Row]:
    """A step's examples in rows, as many rows for each of ``parts`` (microbatches x ranks) as the tightest packing needs.

    In that many rows there is room to spare, and rows of like length need less padding than full rows beside a short one. Only where a
    levelled row would be over the budget do the tight ones stay.
    Where ``len(step)`` is a multiple of ``parts``, so is the number of rows. With fewer examples than that takes, each has its own row.

    Args:
        step: indices of examples; one may occur twice.
        lengths: tokens of each example of the set [E].
        budget: tokens of a row at most, and at least those of the longest example.
        parts: number of parts that the rows are dealt to.
    """
    tight = best_fit_decreasing(step, lengths, budget)
    count = -(-len(tight) // parts) * parts
    level = level_rows(step, lengths, count)
    if max(row_tokens(row, lengths) for row in level) <= budget:
        return level
    return split_rows(tight, lengths, count)


def best_fit_decreasing(step: Sequence[int], lengths: Lengths, budget: int) -> list[Row]:
    """Each example, longest first, into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in _longest_first(step, lengths):
        length = int(lengths[index])
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            assert length <= budget
            room, row = budget, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        insort(rooms, (room - length, row))
    return [tuple(row) for row in rows]


def level_rows(step: Sequence[int], lengths: Lengths, count: int) -> list[Row]:
    """``count`` rows of like length: each example, longest first, to the emptiest. Fewer where there are fewer examples."""
    rows: list[list[int]] = [[] for _ in range(min(count, len(step)))]
    heap = [(0, number) for number in range(len(rows))]  # (tokens, row)
    for index in _longest_first(step, lengths):
        tokens, number = heap[0]
        rows[number].append(index)
        heapreplace(heap, (tokens + int(lengths[index]), number))
    return [tuple(row) for row in rows]


def split_rows(rows: Sequence[Row], lengths: Lengths, count: int) -> list[Row]:
    """``count`` rows, by halving the row with most tokens; fewer where every example has its own row before that."""
    done = [row for row in rows if len(row) == 1]
    heap = [(-row_tokens(row, lengths), number, row) for number, row in enumerate(rows) if len(row) > 1]
    heapify(heap)
    number = len(rows)
    while heap and len(done) + len(heap) < count:
        for half in level_rows(heappop(heap)[-1], lengths, 2):
            if len(half) == 1:
                done.append(half)
            else:
                heappush(heap, (-row_tokens(half, lengths), number, half))
            number += 1
    return done + [row for _, _, row in sorted(heap)]


def row_tokens(row: Row, lengths: Lengths) -> int:
    """Tokens of a row without padding."""
    return sum(int(lengths[index]) for index in row)


def _longest_first(step: Sequence[int], lengths: Lengths) -> list[int]:
    return sorted(step, key=lambda index: -lengths[index])


def check_pack_length(pack_length: int, longest: int) -> None:
    """Raises UserError where a packed row of ``pack_length`` tokens cannot hold an example of ``longest`` tokens."""
    if pack_length < longest:
        raise UserError(
            f"data.pack_length must hold the longest example, got {pack_length} for one of {longest} tokens; "
            "raise it, or set data.dataset.max_length"
        )
