"""A step's examples in few rows: the same examples, no row over its budget, the same number of rows for everyone."""

from collections import Counter
from itertools import combinations, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lightning.data.packing import best_fit_decreasing, level_rows, pack_step, row_tokens, split_rows
from qlora_lightning.data.steps import Microbatch, StepSampler, StepShape, plan_epoch

Rows = list[tuple[int, ...]]
LENGTHS = np.random.default_rng(1).integers(5, 500, size=1003)
EXAMPLES = st.lists(st.integers(1, 99), min_size=1, max_size=60).map(np.array)


def steps_of(sizes: st.SearchStrategy[np.ndarray]) -> st.SearchStrategy[tuple[np.ndarray, list[int]]]:
    """Lengths of a set, and a step of its examples in any order, some of them twice."""
    return sizes.flatmap(lambda lengths: st.tuples(st.just(lengths), st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=60)))


def examples_of(rows: Rows) -> Counter[int]:
    return Counter(index for row in rows for index in row)


def tokens(rows: Rows, lengths: np.ndarray) -> list[int]:
    return [row_tokens(row, lengths) for row in rows]


def test_an_example_goes_where_least_room_is_left() -> None:
    assert best_fit_decreasing(range(5), np.array([6, 5, 4, 3, 2]), budget=10) == [(0, 2), (1, 3, 4)]
    assert best_fit_decreasing([2, 2, 0], np.array([6, 5, 4]), budget=10) == [(0, 2), (2,)]


@given(step=steps_of(EXAMPLES), slack=st.integers(0, 300))
def test_rows_hold_every_example_once_within_the_budget(step: tuple[np.ndarray, list[int]], slack: int) -> None:
    """And no two rows would fit into one, so that there are fewer than twice as many as any packing needs."""
    lengths, indices = step
    budget = int(lengths.max()) + slack
    rows = best_fit_decreasing(indices, lengths, budget)
    assert examples_of(rows) == Counter(indices)
    assert max(tokens(rows, lengths)) <= budget
    assert all(one + other > budget for one, other in combinations(tokens(rows, lengths), 2))


@given(step=steps_of(EXAMPLES), slack=st.integers(0, 300), count=st.integers(1, 60))
def test_splitting_gives_as_many_rows_as_asked_or_as_there_are_examples(step: tuple[np.ndarray, list[int]], slack: int, count: int) -> None:
    lengths, indices = step
    budget = int(lengths.max()) + slack
    rows = best_fit_decreasing(indices, lengths, budget)
    split = split_rows(rows, lengths, count)
    assert len(split) == max(len(rows), min(count, len(indices)))
    assert examples_of(split) == Counter(indices)
    assert max(tokens(split, lengths)) <= budget
    assert all(split)


def test_the_fullest_row_is_halved_in_balance() -> None:
    lengths = np.array([9, 8, 7, 6, 5, 40])
    assert sorted(split_rows([(0, 1, 2, 3), (4,), (5,)], lengths, 4)) == [(0, 3), (1, 2), (4,), (5,)]  # a long example cannot be halved


def test_rows_that_need_not_be_full_are_levelled() -> None:
    lengths = np.array([6, 5, 5, 4, 4, 3, 3])
    assert tokens(best_fit_decreasing(range(7), lengths, budget=20), lengths) == [20, 10]
    assert tokens(pack_step(range(7), lengths, budget=20, parts=1), lengths) == [14, 16]


def test_rows_stay_tight_where_levelling_would_break_the_budget() -> None:
    lengths = np.array([7, 5, 5, 3, 3])
    assert tokens(level_rows(range(5), lengths, count=2), lengths) == [13, 10]
    assert pack_step(range(5), lengths, budget=12, parts=1) == [(0, 1), (2, 3, 4)]


@given(step=steps_of(EXAMPLES), count=st.integers(1, 60))
def test_levelled_rows_differ_by_no_more_than_an_example(step: tuple[np.ndarray, list[int]], count: int) -> None:
    lengths, indices = step
    rows = level_rows(indices, lengths, count)
    assert len(rows) == min(count, len(indices))
    assert examples_of(rows) == Counter(indices)
    assert max(tokens(rows, lengths)) - min(tokens(rows, lengths)) <= lengths.max()


@given(step=steps_of(EXAMPLES), slack=st.integers(0, 300), parts=st.integers(1, 8))
def test_a_step_that_divides_evenly_gives_every_part_as_many_rows(step: tuple[np.ndarray, list[int]], slack: int, parts: int) -> None:
    lengths, indices = step
    budget = int(lengths.max()) + slack
    rows = pack_step(indices * parts, lengths, budget, parts)  # as many examples as a multiple of the parts
    assert len(rows) % parts == 0
    assert len(rows) - parts < len(best_fit_decreasing(indices * parts, lengths, budget))  # no more than evening out needs


@st.composite
def layouts(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Lengths, a global batch size, and the microbatches and ranks that divide it."""
    microbatches, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return draw(EXAMPLES), draw(st.integers(1, 6)) * microbatches * ranks, microbatches, ranks


def planned(layout: tuple[np.ndarray, int, int, int], pack_length: int | None, limit: int | None = None) -> list[list[Microbatch]]:
    """The microbatches of epoch 1, by rank."""
    lengths, size, microbatches, ranks = layout
    dataset = SimpleNamespace(lengths=lengths, targets=lengths - 1, parts=[(len(lengths), 1.0)])
    samplers = [
        StepSampler(dataset, StepShape(size, microbatches, rank, ranks, pack_length), 3, True, epoch=1, limit=limit)
        for rank in range(ranks)
    ]
    parts = [list(sampler) for sampler in samplers]
    assert limit is not None or {len(part) for part in parts} == {len(samplers[0])}
    return parts


@given(layout=layouts(), slack=st.integers(0, 300))
def test_packing_leaves_the_steps_as_they_are(layout: tuple[np.ndarray, int, int, int], slack: int) -> None:
    """Same examples, same token counts, same number of microbatches on every rank, for full and for short steps."""
    lengths, size, microbatches, _ = layout
    budget = int(lengths.max()) + slack
    packed, unpacked = planned(layout, budget), planned(layout, None)
    assert packed == planned(layout, budget)
    assert [[part.tokens_in_step for part in rank] for rank in packed] == [[part.tokens_in_step for part in rank] for rank in unpacked]
    for number, step in enumerate(plan_epoch(lengths, size, 3, 1, True)):
        mine = [part for rank in packed for part in rank[number * microbatches : (number + 1) * microbatches]]
        counted = [part for part in mine if not part.filler]
        rows = [row for part in counted for row in part.rows]
        assert examples_of(rows) == Counter(step)
        assert max(tokens(rows, lengths)) <= budget
        assert {part.tokens_in_step for part in mine} == {sum(lengths[index] - 1 for index in step)}
        if len(step) == size:
            assert len({len(part.rows) for part in mine}) == 1
            assert counted == mine
        assert all(part.rows for part in mine)


@given(layout=layouts(), slack=st.integers(0, 300))
def test_the_fullest_rows_of_a_step_come_first_and_alike_rows_together(layout: tuple[np.ndarray, int, int, int], slack: int) -> None:
    lengths, size, microbatches, _ = layout
    if len(lengths) < size:
        return
    first_step = [rank[:microbatches] for rank in planned(layout, int(lengths.max()) + slack)]
    rounds = [[n for rank in first_step for n in tokens(list(rank[number].rows), lengths)] for number in range(microbatches)]
    assert all(min(fuller) >= max(emptier) for fuller, emptier in pairwise(rounds))


def test_a_cut_step_counts_what_it_keeps() -> None:
    layout = (LENGTHS, 16, 4, 1)
    (full,), (cut,) = planned(layout, 600), planned(layout, 600, limit=6)
    assert cut[:4] == full[:4]
    assert [part.rows for part in cut[4:]] == [part.rows for part in full[4:6]]
    assert cut[4].tokens_in_step == sum(LENGTHS[index] - 1 for part in cut[4:] for index in part.indices)


def test_packing_computes_hardly_a_token_of_padding() -> None:
    def computed(pack_length: int | None) -> float:
        parts = planned((LENGTHS, 32, 2, 1), pack_length)[0]
        return sum(len(part.rows) * max(tokens(list(part.rows), LENGTHS)) for part in parts) / LENGTHS.sum()

    assert computed(2048) < 1.01 < computed(None)


def test_a_budget_below_an_example_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        best_fit_decreasing([0], np.array([11]), budget=10)
