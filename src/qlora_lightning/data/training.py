"""What the trainer goes through: epochs of planned steps over prepared examples, or one endless epoch over a stream."""

from math import ceil
from typing import Any, Protocol

from torch.utils.data import DataLoader

from qlora_lightning.data.collate import Collator
from qlora_lightning.data.dataset import TokenizedDataset
from qlora_lightning.data.steps import ResumableLoader, StepDataset, StepLoader, StepSampler, StepShape, epoch_size, own_generator
from qlora_lightning.data.stream import StreamedSet, StreamedSteps
from qlora_lightning.data.workers import tokenize_alone
from qlora_lightning.errors import UserError


class Training(Protocol):
    """The steps of a run and their loader."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the short last one included; as far as the trainer's limit_train_batches lets it go."""
        ...

    @property
    def microbatches_per_epoch(self) -> int:
        """Microbatches of an epoch on this rank; as far as the trainer's limit_train_batches lets it go."""
        ...

    def loader(self, step: int, collator: Collator, num_workers: int) -> DataLoader[Any]:
        """The microbatches from optimizer step ``step`` of the run on."""
        ...


class PlannedTraining:
    """Epochs of whole optimizer steps, planned from known lengths.

    Args:
        dataset: the examples.
        shape: how a step is divided.
        seed: of the order.
        group_by_length: make up steps of examples of like length.
        limit: the trainer's limit_train_batches.
    """

    def __init__(self, dataset: TokenizedDataset, shape: StepShape, seed: int, group_by_length: bool, limit: int | float | None) -> None:
        self._dataset, self._shape, self._seed, self._group_by_length = dataset, shape, seed, group_by_length
        whole = len(self._sampler(0, 0, None))
        limit = max(1, int(whole * limit)) if isinstance(limit, float) else int(limit or whole)
        self._limit = limit if limit < whole else None
        self._whole = whole

    @property
    def steps_per_epoch(self) -> int:
        if self._limit is not None:  # a part of a step left over at its end becomes a short step
            return ceil(self._limit / self._shape.microbatches)
        return ceil(epoch_size(self._dataset.parts) / self._shape.global_batch_size)

    @property
    def microbatches_per_epoch(self) -> int:
        return self._limit or self._whole

    def loader(self, step: int, collator: Collator, num_workers: int) -> DataLoader[Any]:
        epoch, start = divmod(step, self.steps_per_epoch)
        return StepLoader(
            StepDataset(self._dataset),
            self._sampler(epoch, start, self._limit),
            collate_fn=collator.train,
            num_workers=num_workers,
            generator=own_generator(self._seed),
        )

    def _sampler(self, epoch: int, start: int, limit: int | None) -> StepSampler:
        return StepSampler(self._dataset, self._shape, self._seed, self._group_by_length, epoch, start, limit)


class StreamedTraining:
    """One epoch of as many steps as the trainer takes.

    Args:
        streamed: the set.
        shape: how a step is divided.
        seed: of the shuffle buffer.
        max_steps: the trainer's.
        limit: the trainer's limit_train_batches.

    Raises:
        UserError: the trainer does not say when to end, or limits epochs that there are not.
    """

    def __init__(self, streamed: StreamedSet, shape: StepShape, seed: int, max_steps: int, limit: int | float | None) -> None:
        if max_steps <= 0 or limit not in (None, 1.0):
            leave_out = "" if limit in (None, 1.0) else f" and leave out trainer.limit_train_batches {limit}"
            raise UserError(f"data.streaming has no epochs that could say when to end; set --trainer.max_steps N{leave_out}")
        self._streamed, self._shape, self._seed, self._max_steps = streamed, shape, seed, max_steps

    @property
    def steps_per_epoch(self) -> int:
        return self._max_steps

    @property
    def microbatches_per_epoch(self) -> int:
        return self._max_steps * self._shape.microbatches

    def loader(self, step: int, collator: Collator, num_workers: int) -> DataLoader[Any]:
        return ResumableLoader(
            StreamedSteps(self._streamed.chunks, self._shape, self._seed, step),
            batch_size=None,
            collate_fn=collator.train,  # type: ignore[arg-type]  # of single items, as there is no batch size
            num_workers=min(num_workers, 1),  # more would each read the whole stream
            worker_init_fn=tokenize_alone,
            generator=own_generator(self._seed),
        )
