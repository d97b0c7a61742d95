"""Training on rows as they stream in, for sets larger than the disk: whole optimizer steps without a plan of the epoch.

The order is that of the files, loosened by a shuffle buffer, and depends on the seed alone. The stream begins again when it ends, and a
step may lie across the border, so that every step is full. A resumed run reads the stream from its beginning and passes over the examples
of the steps that it has taken.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from qlora_lightning.console import say
from qlora_lightning.data.dataset import Numbers, TokenizedDataset, TokenizedExample
from qlora_lightning.data.files import data_files
from qlora_lightning.data.hub import HUB, stream_sources
from qlora_lightning.data.packing import check_pack_length
from qlora_lightning.data.prepared import Prepared, row_tokenizer, tokenizer_identity, units_of
from qlora_lightning.data.sets import Part, RowSet
from qlora_lightning.data.steps import Microbatch, StepShape, microbatches_of
from qlora_lightning.data.tokenize import Chunk, RowTokenizer
from qlora_lightning.data.unchanged import states_of
from qlora_lightning.data.workers import map_batches
from qlora_lightning.errors import UserError

BUFFER = 10_000
"""Examples among which the next one is drawn."""
_MIB = 2**20
BEGINNING = 1000
"""Rows of a stream to look at."""


class _Streamed(NamedTuple):
    """An example, how many of its tokens are predicted, and the number of the row that it comes from."""

    example: TokenizedExample
    targets: int
    row: int


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

    def _step(self, examples: list[_Streamed]) -> Iterator[tuple[Microbatch, list[list[TokenizedExample]]]]:
        lengths = np.array([len(one.example.input_ids) for one in examples])
        targets = np.array([one.targets for one in examples])
        if self._shape.pack_length is not None:
            check_pack_length(self._shape.pack_length, int(lengths.max()))
        for microbatch in microbatches_of(range(len(examples)), lengths, targets, self._shape):
            rows = tuple(tuple(examples[index].row for index in row) for row in microbatch.rows)
            yield replace(microbatch, rows=rows), [[examples[index].example for index in row] for row in microbatch.rows]

    def _shuffled(self) -> Iterator[_Streamed]:
        """Pass after pass, each example once in each, ``BUFFER`` places late on average."""
        generator = np.random.default_rng([self._seed, 0, 2])
        while True:
            buffer: list[_Streamed] = []
            for one in self._pass():
                if len(buffer) < BUFFER:
                    buffer.append(one)
                    continue
                place = int(generator.integers(BUFFER))
                yield buffer[place]
                buffer[place] = one
            yield from (buffer[place] for place in generator.permutation(len(buffer)))

    def _pass(self) -> Iterator[_Streamed]:
        for chunk in self._read():
            examples = TokenizedDataset.from_batches([chunk.batch], "")
            targets, rows = examples.targets.tolist(), examples.columns["row"].tolist()
            yield from (_Streamed(examples[index], targets[index], rows[index]) for index in range(len(examples)))


def _ends(file: Path) -> tuple[int, str]:
    """Size of a file, and a hash of its first and last MiB: enough to see that it is another, without reading what may be terabytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_MIB))
        stream.seek(max(0, size - _MIB))
        digest.update(stream.read())
    return size, digest.hexdigest()


class StreamedSet(RowSet):
    """A set of which nothing is prepared. Its first ``validation_size`` rows are held out where no validation file is given."""

    def check(self) -> None:
        """Raises UserError where no row can be trained on; reads as far as the first that can. From now on no file may change."""
        self.fingerprint()
        if not any(chunk.batch.num_rows for chunk in self.chunks()):
            raise UserError("no row of the stream is left to use; correct the rows or the limits in data.dataset")

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the training rows."""
        return self._tokenized(self._sources[0], skip=len(self._held))

    @cached_property
    def everything(self) -> Part:
        """The beginning of it, to look at: nobody wants to wait for the end of a stream."""
        return self._part(self._tokenized(self._sources[0], most=len(self._held) + BEGINNING))

    @cached_property
    def training(self) -> Part:
        """The beginning of it, to look at."""
        return self._part(self._tokenized(self._sources[0], skip=len(self._held), most=len(self._held) + BEGINNING))

    @cached_property
    def validation(self) -> Part | None:
        """The held-out rows, tokenized now and kept in memory."""
        given = self._sources[1]
        if given:
            return self._part(self._tokenized(given))
        return self._part(self._tokenized(self._sources[0], most=len(self._held))) if len(self._held) else None

    @property
    def bad(self) -> list[str]:
        """As far as ``everything`` goes."""
        return [line for chunk in self._tokenized(self._sources[0], most=len(self._held) + BEGINNING) for line in chunk.bad]

    def fingerprint(self) -> str:
        """A hash (hex) of what the stream is made of, short of reading it: sizes and ends of local files, rules and tokenizer.

        Taken once: what a file has become since is no part of what was trained on.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        rows = [source if source.startswith(HUB) else [_ends(member) for member in data_files(source)] for source in self._sources[0]]
        rules = {name: value for name, value in asdict(self.spec).items() if name not in ("name", "path", "validation_path")}
        parts = [rows, rules, tokenizer_identity(self._tokenizer)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _tokenized(self, sources: Sequence[str], skip: int = 0, most: int | None = None) -> Iterator[Chunk]:
        return map_batches(self._work, islice(units_of(self._read(sources), self._work.parser), skip, most), processes=1)

    def _part(self, chunks: Iterator[Chunk]) -> Part:
        found = list(chunks)
        examples = TokenizedDataset.from_batches([chunk.batch for chunk in found], "")
        rows = sum(chunk.rows for chunk in found)
        skipped = [row for chunk in found for row in chunk.skipped]
        return Prepared(examples, rows, skipped, []).whole()

    @cached_property
    def _work(self) -> RowTokenizer:
        return row_tokenizer(next(self._read(self._sources[0])), self.spec, self._tokenizer)

    @cached_property
    def _sources(self) -> tuple[list[str], list[str]]:
        training, validation = stream_sources(self.spec)
        self._states = {file: states_of([file]) for file in (*training, *validation) if not file.startswith(HUB)}
        return training, validation

    @cached_property
    def _held(self) -> Numbers:
        size = self.spec.validation_size
        if 0 < size < 1 and not self._sources[1]:
            raise UserError(
                f"data.dataset.validation_size must be a number of rows where data.streaming is true, got {size}; name how many to hold out"
            )
        return np.arange(0 if self._sources[1] else int(size))
