"""Which examples make up which optimizer step, planned before training from the known lengths.

A plan is whole optimizer steps and depends on (seed, epoch) alone: microbatches and ranks only divide a step that is already fixed. So
every microbatch can carry the number of supervised tokens of its whole step, and the gradient is the same whatever the division.
No function here draws from a global random number generator.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from qlora_lightning.data.tokenize import TokenizedDataset, TokenizedExample

Lengths = npt.NDArray[np.int64]
_GROUP_STEPS = 50  # steps sorted together: long enough for rows of like length, short enough that epochs stay shuffled


def plan_epoch(lengths: Lengths, global_batch_size: int, seed: int, epoch: int, group_by_length: bool) -> list[list[int]]:
    """The optimizer steps of an epoch, as example indices; a short last step stays last.

    Args:
        lengths: tokens of each example [E].
        global_batch_size: examples a step.
        seed: with ``epoch``, all that the plan's order depends on.
        epoch: from 0. In epoch 0 the step with the longest example comes first, so that a lack of memory shows at once.
        group_by_length: steps of examples of like length (less padding), in shuffled order.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if epoch == 0:  # the longest example may not fall into the short step, which cannot come first
        place = int(np.argmax(lengths[order]))
        order[[0, place]] = order[[place, 0]]
    full = len(order) // global_batch_size * global_batch_size
    if group_by_length:
        group = _GROUP_STEPS * global_batch_size
        for start in range(0, full, group):
            part = order[start : min(start + group, full)]
            part[:] = part[np.argsort(-lengths[part], kind="stable")]
    steps = rng.permutation(order[:full].reshape(-1, global_batch_size), axis=0)
    if epoch == 0 and len(steps):
        first = int(np.argmax(lengths[steps].max(axis=1)))
        steps[[0, first]] = steps[[first, 0]]
    plan: list[list[int]] = steps.tolist()
    return plan + ([order[full:].tolist()] if full < len(order) else [])


def split_step(
    step: Sequence[int], lengths: Lengths, microbatches: int, global_batch_size: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """A rank's microbatches of one step, longest examples first. The short last step has fewer microbatches, not smaller ones.

    All ranks get the same number. Where a short step has fewer examples left than ranks, some ranks' last list is empty.
    """
    size = global_batch_size // microbatches
    ordered = sorted(step, key=lambda index: -lengths[index])
    return [ordered[start : start + size][rank::ranks] for start in range(0, len(ordered), size)]


@dataclass(frozen=True)
class Microbatch:
    """What the loader is asked for: which examples, and the supervised tokens of the whole optimizer step they are part of."""

    indices: tuple[int, ...]
    tokens_in_step: int
    filler: bool = False
    """The examples only keep this rank in time with the others; their labels do not count."""


class StepSampler(Sampler[Microbatch]):
    """The microbatches of one epoch after another, the first from a given optimizer step on.

    ``iter()`` plans the epoch at once, so that nothing that happens later disturbs it; ``advance()`` moves on to the next. The two are
    apart because a loader with workers calls ``iter()`` twice an epoch. ``len()`` is always a full epoch's, as Lightning counts a resumed
    epoch from its beginning.

    Args:
        dataset: gives lengths and targets.
        global_batch_size: examples a step, a multiple of ``microbatches * ranks``.
        microbatches: the trainer's accumulate_grad_batches.
        seed: of the plan.
        group_by_length: see ``plan_epoch``.
        epoch: the first epoch to give.
        start: the optimizer step at which that epoch begins.
        limit: microbatches an epoch after which the trainer stops; a step that it cuts counts only what it keeps. None: all.
        rank: whose microbatches.
        ranks: how many there are.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        global_batch_size: int,
        microbatches: int,
        seed: int,
        group_by_length: bool,
        epoch: int = 0,
        start: int = 0,
        limit: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert global_batch_size % (microbatches * ranks) == 0
        self._lengths, self._targets = dataset.lengths, dataset.targets
        self._global_batch_size, self._microbatches = global_batch_size, microbatches
        self._seed, self._group_by_length = seed, group_by_length
        self._rank, self._ranks, self._limit = rank, ranks, limit
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        full, rest = divmod(len(self._lengths), self._global_batch_size)
        return full * self._microbatches + ceil(rest / (self._global_batch_size // self._microbatches))

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self._plan())

    def advance(self) -> None:
        """From now on ``iter()`` gives the next epoch, whole."""
        self.epoch, self.start = self.epoch + 1, 0

    def _plan(self) -> list[Microbatch]:
        steps = plan_epoch(self._lengths, self._global_batch_size, self._seed, self.epoch, self._group_by_length)
        limit = len(self) if self._limit is None else self._limit
        planned: list[Microbatch] = []
        for number, step in enumerate(steps[self.start :], self.start):
            planned += self._microbatches_of(step, limit - number * self._microbatches)
        return planned

    def _microbatches_of(self, step: list[int], most: int) -> list[Microbatch]:
        if most <= 0:
            return []
        whole = split_step(step, self._lengths, self._microbatches, self._global_batch_size)[:most]
        tokens = int(sum(self._targets[part].sum() for part in whole))
        mine = split_step(step, self._lengths, self._microbatches, self._global_batch_size, self._rank, self._ranks)[:most]
        return [Microbatch(tuple(part or whole[-1][-1:]), tokens, filler=not part) for part in mine]


class StepDataset:
    """Hands the loader a microbatch with its examples, so that the collator knows the step's token count."""

    def __init__(self, dataset: TokenizedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self._dataset[index]

    def __getitems__(self, microbatch: Microbatch) -> tuple[Microbatch, list[TokenizedExample]]:
        return microbatch, [self._dataset[index] for index in microbatch.indices]


class StepLoader(DataLoader[Any]):
    """A loader of planned steps that Lightning knows to be resumable. Each ``iter()`` gives the sampler's next epoch.

    It keeps no state: how far it has fetched runs ahead of training. Where to go on follows from the trainer's global step, for which the
    data module builds the sampler anew.
    """

    def __init__(self, dataset: StepDataset, sampler: StepSampler, **options: Any) -> None:
        """``options`` as for ``DataLoader``."""
        super().__init__(dataset, batch_sampler=sampler, **options)  # type: ignore[arg-type]  # a microbatch is more than indices
        self._steps = sampler

    def __iter__(self) -> Any:
        iterator = super().__iter__()  # has planned its epoch
        self._steps.advance()
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see the class."""


def own_generator(seed: int) -> torch.Generator:
    """For a loader's ``generator``: without one, each of its iterators draws from the global generator."""
    return torch.Generator().manual_seed(seed)
