"""Which examples make up which optimizer step, planned before training from the known lengths.

A plan is whole optimizer steps and depends on (seed, epoch) alone: microbatches and ranks only divide a step that is already fixed. So
every microbatch can carry the number of supervised tokens of its whole step, and the gradient is the same whatever the division.
Packing (``packing.py``) only lays the examples of a step out in rows. No function here draws from a global random number generator.

Shapes: E examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from qlora_lightning.data.dataset import TokenizedDataset, TokenizedExample
from qlora_lightning.data.packing import Lengths, Row, pack_step, row_tokens
from qlora_lightning.errors import UserError

Parts = Sequence[tuple[int, float]]
"""(number of examples, weight) of each set of a mix, whose examples follow each other."""
_GROUP_STEPS = 50  # steps sorted together: long enough for rows of like length, short enough that epochs stay shuffled


def plan_epoch(
    lengths: Lengths, global_batch_size: int, seed: int, epoch: int, group_by_length: bool, parts: Parts | None = None
) -> list[list[int]]:
    """The optimizer steps of an epoch, as example indices; a short last step stays last.

    Args:
        lengths: tokens of each example [E].
        global_batch_size: examples a step.
        seed: with ``epoch``, all that the plan's order depends on.
        epoch: from 0. In epoch 0 the step with the longest example comes first, so that a lack of memory shows at once.
        group_by_length: steps of examples of like length (less padding), in shuffled order.
        parts: how often each set's examples occur in an epoch, see ``epoch_size``. None: each once.
    """
    rng = np.random.default_rng([seed, epoch])
    drawn = _draw([(len(lengths), 1.0)] if parts is None else parts, rng)
    order = drawn[rng.permutation(len(drawn))]
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


def epoch_size(parts: Parts) -> int:
    """Examples of an epoch: of each set, its number times its weight, rounded."""
    return sum(round(number * weight) for number, weight in parts)


def _draw(parts: Parts, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The examples of one epoch, set after set: each as often as its set's whole weight says, and a fresh draw for the fraction."""
    drawn, first = [], 0
    for number, weight in parts:
        drawn.append(np.tile(np.arange(first, first + number), int(weight)))
        if rest := round(number * weight) - number * int(weight):  # whole weights draw nothing: their plans are those of one set
            drawn.append(first + rng.permutation(number)[:rest])
        first += number
    return np.concatenate(drawn)


def split_step(
    step: Sequence[int], lengths: Lengths, microbatches: int, global_batch_size: int, ranks: int = 1, pack_length: int | None = None
) -> list[list[Row]]:
    """The microbatches of one step, each as the rows of all ranks: those with most tokens first, so that rows beside each other are alike.

    The short last step has fewer microbatches, not smaller ones; packed or not, it has the same number.
    """
    size = global_batch_size // microbatches
    count = ceil(len(step) / size)
    if pack_length is None:
        rows: list[Row] = [(index,) for index in step]
    else:
        rows = pack_step(step, lengths, pack_length, count * ranks)
        size = ceil(len(rows) / (count * ranks)) * ranks
    ordered = sorted(rows, key=lambda row: -row_tokens(row, lengths))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@dataclass(frozen=True)
class Microbatch:
    """What the loader is asked for: which examples, and the supervised tokens of the whole optimizer step they are part of."""

    rows: tuple[Row, ...]
    """The examples of each row, by their place in the set (in a stream, by the number of the row that each comes from); one a row without
    packing."""
    tokens_in_step: int
    filler: bool = False
    """The examples only keep this rank in time with the others; their labels do not count."""

    @property
    def indices(self) -> tuple[int, ...]:
        """All examples, row by row."""
        return tuple(index for row in self.rows for index in row)


@dataclass(frozen=True)
class StepShape:
    """How optimizer steps are divided."""

    global_batch_size: int
    """Examples a step, a multiple of ``microbatches * ranks``."""
    microbatches: int
    """The trainer's accumulate_grad_batches."""
    rank: int = 0
    """Whose microbatches."""
    ranks: int = 1
    """How many there are."""
    pack_length: int | None = None
    """Tokens of a row that a step's examples are packed into, at least those of the longest. None: one example a row."""

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.microbatches * self.ranks) == 0


def microbatches_of(step: Sequence[int], lengths: Lengths, targets: Lengths, shape: StepShape, most: int | None = None) -> list[Microbatch]:
    """A rank's microbatches of one step.

    Args:
        step: indices of its examples.
        lengths: tokens of each example of the set [E].
        targets: supervised tokens of each example of the set [E].
        shape: how the step is divided.
        most: microbatches after which the trainer stops; the step then counts only what they hold. None: all.
    """
    whole = split_step(step, lengths, shape.microbatches, shape.global_batch_size, shape.ranks, shape.pack_length)[:most]
    tokens = sum(int(targets[list(row)].sum()) for part in whole for row in part)
    mine = [part[shape.rank :: shape.ranks] for part in whole]  # a short step may leave a rank without a row
    return [Microbatch(tuple(part or whole[-1][-1:]), tokens, filler=not part) for part in mine]


class StepSampler(Sampler[Microbatch]):
    """The microbatches of one epoch after another, the first from a given optimizer step on.

    ``iter()`` plans the epoch at once, so that nothing that happens later disturbs it; ``advance()`` moves on to the next. The two are
    apart because a loader with workers calls ``iter()`` twice an epoch. ``len()`` is always a full epoch's, as Lightning counts a resumed
    epoch from its beginning.

    Args:
        dataset: gives lengths, targets, and the parts of a mix.
        shape: how steps are divided.
        seed: of the plan.
        group_by_length: see ``plan_epoch``.
        epoch: the first epoch to give.
        start: the optimizer step at which that epoch begins.
        limit: microbatches an epoch after which the trainer stops; a step that it cuts counts only what it keeps. None: all.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        shape: StepShape,
        seed: int,
        group_by_length: bool,
        epoch: int = 0,
        start: int = 0,
        limit: int | None = None,
    ) -> None:
        self._lengths, self._targets, self._parts = dataset.lengths, dataset.targets, dataset.parts
        self._shape, self._seed, self._group_by_length, self._limit = shape, seed, group_by_length, limit
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        size, microbatches = self._shape.global_batch_size, self._shape.microbatches
        full, rest = divmod(epoch_size(self._parts), size)
        return full * microbatches + ceil(rest / (size // microbatches))

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self._plan())

    def advance(self) -> None:
        """From now on ``iter()`` gives the next epoch, whole."""
        self.epoch, self.start = self.epoch + 1, 0

    def _plan(self) -> list[Microbatch]:
        size, microbatches = self._shape.global_batch_size, self._shape.microbatches
        steps = plan_epoch(self._lengths, size, self._seed, self.epoch, self._group_by_length, self._parts)
        limit = len(self) if self._limit is None else self._limit
        planned: list[Microbatch] = []
        for number, step in enumerate(steps[self.start :], self.start):
            left = limit - number * microbatches
            planned += microbatches_of(step, self._lengths, self._targets, self._shape, left) if left > 0 else []
        return planned


class StepDataset:
    """Hands the loader a microbatch with its examples, so that the collator knows the step's token count."""

    def __init__(self, dataset: TokenizedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self._dataset[index]

    def __getitems__(self, microbatch: Microbatch) -> tuple[Microbatch, list[list[TokenizedExample]]]:
        return microbatch, [[self._dataset[index] for index in row] for row in microbatch.rows]


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning knows to be resumable.

    It keeps no state: how far it has fetched runs ahead of training. Where to go on follows from the trainer's global step, for which the
    data module builds the loader anew.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see the class."""


class StepLoader(ResumableLoader):
    """A loader of planned steps. Each ``iter()`` gives the sampler's next epoch."""

    def __init__(self, dataset: StepDataset, sampler: StepSampler, **options: Any) -> None:
        """``options`` as for ``DataLoader``."""
        super().__init__(dataset, batch_sampler=sampler, **options)  # type: ignore[arg-type]  # a microbatch is more than indices
        self._steps = sampler

    def __iter__(self) -> Any:
        iterator = super().__iter__()  # has planned its epoch
        self._steps.advance()
        return iterator


def check_division(global_batch_size: int, accumulate: int, ranks: int = 1) -> None:
    """Raises UserError unless the global batch divides into ``accumulate`` microbatches on each of ``ranks`` GPUs."""
    size = global_batch_size
    if accumulate < 1:
        raise UserError(f"trainer.accumulate_grad_batches must be 1 or more, got {accumulate}; use 1")
    if size % ranks:
        near = ceil(size / ranks) * ranks
        raise UserError(f"data.global_batch_size must be a multiple of the number of GPUs, got {size} for {ranks} GPUs; use {near}, say")
    if size % (accumulate * ranks):
        possible = ", ".join(str(k) for k in range(1, size // ranks + 1) if size // ranks % k == 0)
        raise UserError(
            f"trainer.accumulate_grad_batches must divide the {size // ranks} examples that each GPU has of "
            f"data.global_batch_size {size}, got {accumulate}; use one of {possible}"
        )


def own_generator(seed: int) -> torch.Generator:
    """For a loader's ``generator``: without one, each of its iterators draws from the global generator."""
    return torch.Generator().manual_seed(seed)
