"""Whole optimizer steps, the same whatever divides them."""

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lightning.data.dataset import SCHEMA, TokenizedDataset
from qlora_lightning.data.steps import (
    Microbatch,
    StepDataset,
    StepLoader,
    StepSampler,
    StepShape,
    epoch_size,
    own_generator,
    plan_epoch,
    split_step,
)

LENGTHS = np.random.default_rng(1).integers(5, 500, size=1003)


def dataset_of(lengths: np.ndarray) -> TokenizedDataset:
    """Examples whose first two tokens are the prompt."""
    rows = [
        {
            "row": number,
            "input_ids": [7] * int(length),
            "supervised": [int(n >= 2) for n in range(length)],
            "source_tokens": 2,
            "targets": int(length) - 2,
            "straddling": 0,
            "flags": 0,
        }
        for number, length in enumerate(lengths)
    ]
    return TokenizedDataset.from_batches([pyarrow.RecordBatch.from_pylist(rows, SCHEMA)], "these")


def sampler(
    lengths: np.ndarray = LENGTHS, microbatches: int = 2, rank: int = 0, ranks: int = 1, pack_length: int | None = None, **options: int
) -> StepSampler:
    shape = StepShape(16, microbatches, rank, ranks, pack_length)
    return StepSampler(dataset_of(lengths), shape, seed=3, group_by_length=True, **options)


def test_existing_plans_stay_what_they_are() -> None:
    """A run that was begun with an earlier version goes on in the same order."""
    lengths = np.array([5, 9, 3, 7, 8, 2, 6, 4, 1, 11, 10])
    assert plan_epoch(lengths, 3, seed=3, epoch=0, group_by_length=True) == [[9, 10, 1], [4, 6, 0], [7, 2, 5], [3, 8]]
    unsorted = [[9, 0, 8], [1, 2, 5], [7, 4, 10], [6, 3]]
    assert plan_epoch(lengths, 3, seed=3, epoch=1, group_by_length=False) == unsorted
    assert plan_epoch(lengths, 3, seed=3, epoch=1, group_by_length=False, parts=[(4, 1.0), (7, 1.0)]) == unsorted


@given(
    parts=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 3.5)), min_size=1, max_size=4).filter(epoch_size),
    batch=st.integers(1, 20),
    epoch=st.integers(0, 2),
)
def test_a_mix_gives_each_set_its_share(parts: list[tuple[int, float]], batch: int, epoch: int) -> None:
    """As many examples as number x weight, and none more than once oftener than another of its set."""
    lengths = np.arange(1, sum(number for number, _ in parts) + 1)
    plan = plan_epoch(lengths, batch, seed=0, epoch=epoch, group_by_length=True, parts=parts)
    counts = np.bincount([index for step in plan for index in step], minlength=len(lengths))
    assert counts.sum() == epoch_size(parts)
    for (number, weight), times in zip(parts, np.split(counts, np.cumsum([number for number, _ in parts])[:-1]), strict=True):
        assert times.sum() == round(number * weight)
        assert times.min() >= int(weight)
        assert times.max() <= int(weight) + 1
    assert [len(step) for step in plan[:-1]] == [batch] * (len(plan) - 1)
    if epoch == 0:
        assert max(lengths[plan[0]]) == lengths[counts > 0].max()


def test_each_epoch_draws_anew_from_a_set_of_fractional_weight() -> None:
    def drawn(epoch: int, seed: int = 3) -> set[int]:
        return {index for step in plan_epoch(LENGTHS, 16, seed, epoch, True, [(3, 1.0), (1000, 0.1)]) for index in step}

    assert {0, 1, 2} < drawn(1) == drawn(1)
    assert len({frozenset(drawn(0)), frozenset(drawn(1)), frozenset(drawn(2)), frozenset(drawn(1, seed=4))}) == 4
    assert len(set.union(*(drawn(epoch) for epoch in range(100)))) == len(LENGTHS)


def test_the_sampler_counts_what_the_mix_gives() -> None:
    dataset = dataset_of(LENGTHS[:40])
    dataset.parts = [(30, 2.0), (10, 0.5)]
    mixed = StepSampler(dataset, StepShape(16, 2), seed=3, group_by_length=True)
    given_out = [index for part in mixed for index in part.indices]
    assert len(given_out) == 65
    assert len(mixed) == len(list(mixed)) == 4 * 2 + 1
    assert np.bincount(given_out).tolist()[:30] == [2] * 30


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=200).map(np.array),
    batch=st.integers(1, 20),
    epoch=st.integers(0, 3),
    group=st.booleans(),
)
def test_a_plan_holds_every_example_once_and_only_the_last_step_is_short(lengths: np.ndarray, batch: int, epoch: int, group: bool) -> None:
    plan = plan_epoch(lengths, batch, seed=0, epoch=epoch, group_by_length=group)
    assert sorted(index for step in plan for index in step) == list(range(len(lengths)))
    assert [len(step) for step in plan[:-1]] == [batch] * (len(plan) - 1)
    assert 0 < len(plan[-1]) <= batch
    if epoch == 0:
        assert max(lengths[plan[0]]) == lengths.max()


@pytest.mark.parametrize("group", [True, False])
def test_the_order_follows_from_seed_and_epoch_alone(group: bool) -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch(LENGTHS, 16, seed, epoch, group)

    torch.manual_seed(0)
    first = plan(3, 1)
    torch.manual_seed(1)
    np.random.seed(5)
    assert plan(3, 1) == first
    assert plan(3, 2) != first
    assert plan(4, 1) != first


def test_steps_of_like_length_save_padding_and_stay_shuffled() -> None:
    def padding(group: bool) -> float:
        plan = plan_epoch(LENGTHS, 16, seed=3, epoch=1, group_by_length=group)
        return sum(LENGTHS[step].max() * len(step) for step in plan) / LENGTHS.sum()

    assert padding(True) < 1.05 < 1.5 < padding(False)
    means = [LENGTHS[step].mean() for step in plan_epoch(LENGTHS, 16, seed=3, epoch=1, group_by_length=True)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("examples", [16, 13, 3, 1])
def test_a_step_is_divided_without_loss(examples: int, microbatches: int, ranks: int) -> None:
    lengths = LENGTHS[:examples]
    parts = [list(sampler(lengths, microbatches, rank=rank, ranks=ranks)) for rank in range(ranks)]
    counted = [part for rank in parts for part in rank if not part.filler]
    assert sorted(index for part in counted for index in part.indices) == list(range(examples))
    assert len({len(rank) for rank in parts}) == 1
    assert len(parts[0]) == len(sampler(lengths, microbatches)) <= microbatches
    assert max(len(part.rows) for part in counted) <= 16 // (microbatches * ranks)


def test_the_longest_examples_of_a_step_come_first() -> None:
    first, *_, last = split_step(list(range(16)), LENGTHS, 4, 16)
    assert min(LENGTHS[row[0]] for row in first) >= max(LENGTHS[row[0]] for row in last)


def test_without_packing_a_row_is_an_example() -> None:
    assert {len(row) for part in sampler() for row in part.rows} == {1}


def test_steps_and_their_token_counts_do_not_depend_on_the_microbatches() -> None:
    def steps(microbatches: int) -> list[tuple[set[int], int]]:
        found: dict[int, tuple[set[int], int]] = {}
        for number, part in enumerate(sampler(microbatches=microbatches)):
            step = found.setdefault(number // microbatches, (set(), part.tokens_in_step))
            step[0].update(part.indices)
            assert step[1] == part.tokens_in_step
        return list(found.values())

    whole = steps(1)
    assert whole == steps(2) == steps(4)
    assert [tokens for _, tokens in whole] == [sum(LENGTHS[index] - 2 for index in indices) for indices, _ in whole]


def test_ranks_together_see_what_one_sees() -> None:
    """1003 examples leave a last step of 11: 8 and 3, of which the fourth rank has none and keeps time with a filler."""
    alone = list(sampler(microbatches=2))
    ranks = [list(sampler(microbatches=2, rank=rank, ranks=4)) for rank in range(4)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        counted = [part for part in parts if not part.filler]
        assert sorted(index for part in counted for index in part.indices) == sorted(whole.indices)
        assert {part.tokens_in_step for part in parts} == {whole.tokens_in_step}
    assert [part[-1].filler for part in ranks] == [False, False, False, True]


def test_length_is_always_that_of_a_full_epoch() -> None:
    assert len(sampler()) == len(list(sampler())) == 62 * 2 + 2
    assert len(sampler(start=60)) == 62 * 2 + 2
    assert len(list(sampler(start=60))) == 2 * 2 + 2
    assert len(list(sampler(lengths=LENGTHS[:1000]))) == 62 * 2 + 1  # the last 8 are one microbatch


def test_epochs_follow_each_other_and_each_is_planned_when_it_begins() -> None:
    second, third = list(sampler(epoch=1)), list(sampler(epoch=2))
    resumed = sampler(epoch=1, start=40)
    iterator = iter(resumed)
    resumed.advance()  # before anything was fetched
    assert list(iterator) == second[80:]
    assert list(resumed) == third != second


def test_a_step_that_the_trainers_limit_cuts_counts_what_it_keeps() -> None:
    full = list(sampler(microbatches=4))
    cut = list(sampler(microbatches=4, limit=6))
    assert cut[:4] == full[:4]
    assert [part.indices for part in cut[4:]] == [part.indices for part in full[4:6]]
    assert cut[4].tokens_in_step == sum(LENGTHS[index] - 2 for part in cut[4:] for index in part.indices)
    assert len(sampler(microbatches=4, limit=6)) == len(full)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_hands_over_microbatches_and_leaves_the_global_generator_alone(workers: int) -> None:
    def collate(fetched: tuple[Microbatch, list[list[object]]]) -> tuple[Microbatch, list[int]]:
        return fetched[0], [len(row) for row in fetched[1]]

    planned = list(sampler(LENGTHS[:40], pack_length=500))
    before = torch.get_rng_state()
    dataset = StepDataset(dataset_of(LENGTHS[:40]))
    loader = StepLoader(
        dataset, sampler(LENGTHS[:40], pack_length=500), collate_fn=collate, num_workers=workers, generator=own_generator(0)
    )
    assert list(loader) == [(part, [len(row) for row in part.rows]) for part in planned]
    assert [part for part, _ in loader] == list(sampler(LENGTHS[:40], epoch=1, pack_length=500))
    assert torch.equal(before, torch.get_rng_state())
    assert loader.state_dict() == {}


def test_a_global_batch_that_does_not_divide_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        sampler(microbatches=3)
