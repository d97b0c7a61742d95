"""Training on rows as they stream in, for sets larger than the disk: whole optimizer steps without a plan of the epoch.

The order is that of the files, loosened by a shuffle buffer, and depends on the seed alone. The stream begins again when it ends, so that
every step is full. A resumed run reads the stream from its beginning and passes over the examples of the steps that it has taken.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from qlora_lightning.console import say
from qlora_lightning.data.dataset import Numbers, TokenizedDataset, TokenizedExample
from qlora_lightning.data.hub import stream_sources
from qlora_lightning.data.prepared import Prepared, read_files, tokenized, tokenizer_identity
from qlora_lightning.data.sets import InstructionSet, Part
from qlora_lightning.data.steps import Microbatch, StepShape, microbatches_of
from qlora_lightning.data.tokenize import Chunk
from qlora_lightning.errors import UserError

BUFFER = 10_000
"""Examples among which the next one is drawn."""


class StreamedSteps(IterableDataset[tuple[Microbatch, list[list[TokenizedExample]]]]):
    """The microbatches of one optimizer step after another, without end.

    Args:
        read: begins a new pass over the rows.
        shape: how each step is divided.
        seed: of the shuffle buffer.
        start: optimizer steps to pass over.
    """

    def __init__(self, read: Callable[[], Iterator[Chunk]], shape: StepShape, seed: int, start: int = 0) -> None:
        self._read, self._shape, self._seed, self._start = read, shape, seed, start

    def __iter__(self) -> Iterator[tuple[Microbatch, list[list[TokenizedExample]]]]:
        examples, size = self._shuffled(), self._shape.global_batch_size
        if self._start:
            say(f"Passing over the {self._start * size:,} examples of the {self._start:,} steps taken")
            next(islice(examples, self._start * size - 1, None))
        while True:
            yield from self._step(list(islice(examples, size)))

    def _step(self, examples: list[TokenizedExample]) -> Iterator[tuple[Microbatch, list[list[TokenizedExample]]]]:
        shape = self._shape
        lengths = np.array([len(example.input_ids) for example in examples])
        targets = np.array([np.count_nonzero(example.labels[1:] >= 0) for example in examples])
        if shape.pack_length is not None and lengths.max() > shape.pack_length:
            raise UserError(
                f"data.pack_length must hold the longest example, got {shape.pack_length} for one of {lengths.max()} tokens; "
                "raise it, or set data.dataset.max_length"
            )
        for microbatch in microbatches_of(range(len(examples)), lengths, targets, shape):
            yield microbatch, [[examples[index] for index in row] for row in microbatch.rows]

    def _shuffled(self) -> Iterator[TokenizedExample]:
        """Each example of the stream, at most about ``BUFFER`` places late."""
        generator = np.random.default_rng([self._seed, 0, 2])
        buffer: list[TokenizedExample] = []
        for example in self._endless():
            if len(buffer) < BUFFER:
                buffer.append(example)
                continue
            place = int(generator.integers(BUFFER))
            buffer[place], chosen = example, buffer[place]
            yield chosen

    def _endless(self) -> Iterator[TokenizedExample]:
        while True:
            found = False
            for chunk in self._read():
                examples = TokenizedDataset.from_batches([chunk.batch], "")
                found = found or len(examples) > 0
                yield from (examples[index] for index in range(len(examples)))
            if not found:
                raise UserError("no row of the stream is left to use; correct the rows or the limits in data.dataset")


class StreamedSet(InstructionSet):
    """A set of which nothing is prepared. Its first ``validation_size`` rows are held out where no validation file is given."""

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the training rows."""
        return tokenized(read_files(self._sources[0], self.spec), self.spec, self._tokenizer, skip=len(self._held))

    @cached_property
    def validation(self) -> Part | None:
        """The held-out rows, tokenized now and kept in memory."""
        given = self._sources[1]
        if not given and not len(self._held):
            return None
        most = None if given else len(self._held)
        chunks = list(tokenized(read_files(given or self._sources[0], self.spec), self.spec, self._tokenizer, most=most))
        skipped = [found for chunk in chunks for found in chunk.skipped]
        examples = TokenizedDataset.from_batches([chunk.batch for chunk in chunks], "")
        rows = sum(chunk.rows for chunk in chunks)
        return Prepared(examples, rows, skipped, []).part(np.arange(rows))

    def fingerprint(self) -> str:
        """A hash (hex) of what the stream is made of, short of reading it: places, specification and tokenizer."""
        return hashlib.sha256(repr((self._sources, self.spec, tokenizer_identity(self._tokenizer))).encode()).hexdigest()

    @cached_property
    def _sources(self) -> tuple[list[str], list[str]]:
        return stream_sources(self.spec)

    @cached_property
    def _held(self) -> Numbers:
        size = self.spec.validation_size
        if 0 < size < 1 and not self._sources[1]:
            raise UserError(f"data.dataset.validation_size must be a number of rows where data.streaming is true, got {size}")
        return np.arange(0 if self._sources[1] else int(size))


class StreamLoader(DataLoader[Any]):
    """A loader of streamed steps that Lightning knows to be resumable: where to go on follows from the trainer's global step."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see the class."""
