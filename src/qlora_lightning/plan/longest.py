"""The microbatches that a run will see, from lengths that are known, and the one among them that takes most memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from qlora_lightning.data.collate import Collator
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.packing import Row
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.steps import Microbatch, StepDataset, StepSampler, StepShape, plan_epoch, split_step
from qlora_lightning.fused.microbatch import LENGTH_STEP, Shape, packed_room, shape_of
from qlora_lightning.modeling.tokenizer import filler_id


@dataclass(frozen=True)
class Longest:
    """The microbatch of a run that takes most memory."""

    rows: int
    width: int
    """Tokens of its longest row, padded."""
    positions: int
    """Positions at which transformers' head runs, in each row."""
    shape: Shape
    """As the fused path computes it."""
    known: bool = True
    """Whether it is one of the data's own; else a bound by the limits of lengths."""

    def cut(self, tokens: int) -> "Longest":
        """The same rows, none of them longer than so many tokens."""
        width = min(self.width, tokens)
        return bound(self.rows, width) if width < self.width else self


@dataclass(frozen=True)
class Ahead:
    """What a run will compute."""

    longest: Longest
    steps: int
    """Optimizer steps that the figures below are of."""
    microbatches: int
    """Of each rank."""
    tokens: int
    """Of all ranks, without padding."""
    supervised: int
    computed: int
    """Of the rank that computes most, with the padding that the products see."""


def bound(rows: int, width: int) -> Longest:
    """So many rows of one length, all supervised."""
    length = -(-width // LENGTH_STEP) * LENGTH_STEP
    return Longest(rows, width, width - 1, Shape(rows, length, rows * length), known=False)


def length_limit(spec: DatasetSpec) -> int | None:
    """The most tokens that an example may have, where the data set says so."""
    if spec.max_length is not None:
        return spec.max_length
    if spec.source_max_length is None or spec.target_max_length is None:
        return None
    return spec.source_max_length + spec.target_max_length


def look_ahead(trainer: Trainer, data: InstructionDataModule, epochs: int | None = None, ranks: int = 1) -> Ahead:
    """Go through a run's microbatches, of which only the longest is read.

    Args:
        trainer: of the run.
        data: set up, and not streaming.
        epochs: of which to look at the microbatches; None: all that the run will see.
        ranks: that divide each step.
    """
    shape = StepShape(data.global_batch_size, trainer.accumulate_grad_batches, ranks=ranks, pack_length=data.pack_length)
    limit, epoch = data.microbatches_per_epoch, data.steps_per_epoch
    steps = data.total_steps or epoch
    if epochs is not None:
        steps = min(steps, epochs * epoch)
    planned: list[list[Row]] = []
    for number, done in enumerate(range(0, steps, epoch)):
        left = (steps - done) * trainer.accumulate_grad_batches
        planned += _planned(data, shape, number, min(left, limit))
    return _gone_through(data, planned, ranks, steps)


def longest_of(data: InstructionDataModule, accumulate: int, ranks: int = 1) -> Longest:
    """The longest microbatch of the first epoch, were steps divided into so many on each rank."""
    shape = StepShape(data.global_batch_size, accumulate, ranks=ranks, pack_length=data.pack_length)
    return _gone_through(data, _planned(data, shape, 0, data.microbatches_per_epoch), ranks, 0).longest


def _planned(data: InstructionDataModule, shape: StepShape, epoch: int, limit: int) -> list[list[Row]]:
    """The first microbatches of an epoch, each as the rows of all ranks, the longest rows first."""
    dataset, size = data.train_set, shape.global_batch_size
    planned: list[list[Row]] = []
    for step in plan_epoch(dataset.lengths, size, data.seed, epoch, data.group_by_length, dataset.parts):
        planned += split_step(step, dataset.lengths, shape.microbatches, size, shape.ranks, shape.pack_length)
        if len(planned) >= limit:
            break
    return planned[:limit]


def longest_microbatches(data: InstructionDataModule, accumulate: int) -> list[Microbatch]:
    """Those of the optimizer step in which the longest of the first epoch is."""
    shape = StepShape(data.global_batch_size, accumulate, pack_length=data.pack_length)
    planned = list(StepSampler(data.train_set, shape, data.seed, data.group_by_length))
    first = int(np.argmax(_computed(data, planned))) // accumulate * accumulate
    return planned[first : first + accumulate]


def _gone_through(data: InstructionDataModule, planned: list[list[Row]], ranks: int, steps: int) -> Ahead:
    """Rows are dealt to ranks longest first: the first rank has most to compute, and the others wait for it."""
    dataset = data.train_set
    first = [Microbatch(tuple(rows[::ranks]), 0) for rows in planned]
    computed = _computed(data, first)
    indices = np.concatenate([row for rows in planned for row in rows])
    microbatch = first[int(np.argmax(computed))]
    batch: Any = Collator(filler_id(data.tokenizer), data.pad_to_multiple_of).train(StepDataset(dataset).__getitems__(microbatch))
    rows, width = batch["input_ids"].shape
    return Ahead(
        Longest(rows, width, len(batch["logit_positions"]), shape_of(batch)),
        steps,
        len(planned),
        int(dataset.lengths[indices].sum()),
        int(dataset.targets[indices].sum()),
        int(computed.sum()),
    )


def _computed(data: InstructionDataModule, planned: list[Microbatch]) -> np.ndarray[Any, Any]:
    """Tokens that the fused path computes of each microbatch, about: it lays rows end to end where that saves something."""

    def sizes() -> Iterator[tuple[int, int, int]]:
        lengths = data.train_set.lengths
        for microbatch in planned:
            rows = [int(lengths[list(row)].sum()) for row in microbatch.rows]
            yield len(rows), max(rows), packed_room(sum(rows))

    rows, width, room = np.array(list(sizes())).T
    return np.minimum(rows * -(-width // LENGTH_STEP) * LENGTH_STEP, room)
