"""The microbatches that a run will see, from lengths that are known, and the one among them that takes most memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from qlora_lightning.data.collate import Collator
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.steps import Microbatch, StepDataset, StepSampler, StepShape
from qlora_lightning.fused.microbatch import LENGTH_STEP, PACKED_STEP, Shape, shape_of
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
    tokens: int
    """Without padding."""
    supervised: int
    computed: int
    """With the padding that the products see."""


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


def look_ahead(trainer: Trainer, data: InstructionDataModule, epochs: int | None = None) -> Ahead:
    """Go through a run's microbatches, of which only the longest is read.

    Args:
        trainer: of the run.
        data: set up, and not streaming.
        epochs: of which to look at the microbatches; None: all that the run will see.
    """
    sampler: Any = data.train_dataloader().batch_sampler
    limit, epoch = data.microbatches_per_epoch, data.steps_per_epoch
    steps = data.total_steps or epoch
    if epochs is not None:
        steps = min(steps, epochs * epoch)
    planned: list[Microbatch] = []
    for done in range(0, steps, epoch):
        left = (steps - done) * trainer.accumulate_grad_batches
        planned += list(sampler)[: min(left, limit)]
        sampler.advance()
    return _gone_through(data, planned, steps)


def longest_of(data: InstructionDataModule, accumulate: int) -> Longest:
    """The longest microbatch of the first epoch, were steps divided into so many."""
    shape = StepShape(data.global_batch_size, accumulate, pack_length=data.pack_length)
    return _gone_through(data, list(StepSampler(data.train_set, shape, data.seed, data.group_by_length)), 0).longest


def longest_microbatches(data: InstructionDataModule, accumulate: int) -> list[Microbatch]:
    """Those of the optimizer step in which the longest of the first epoch is."""
    shape = StepShape(data.global_batch_size, accumulate, pack_length=data.pack_length)
    planned = list(StepSampler(data.train_set, shape, data.seed, data.group_by_length))
    first = int(np.argmax(_computed(data, planned))) // accumulate * accumulate
    return planned[first : first + accumulate]


def _gone_through(data: InstructionDataModule, planned: list[Microbatch], steps: int) -> Ahead:
    dataset, computed = data.train_set, _computed(data, planned)
    indices = np.concatenate([microbatch.indices for microbatch in planned])
    microbatch = planned[int(np.argmax(computed))]
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
            yield len(rows), max(rows), sum(rows)

    rows, width, tokens = np.array(list(sizes())).T
    return np.minimum(rows * -(-width // LENGTH_STEP) * LENGTH_STEP, -(-tokens // PACKED_STEP) * PACKED_STEP)
