"""One instruction set of a run: its files prepared, and which of its rows are held out."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from math import ceil
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.dataset import DataReport, Numbers, TokenizedDataset, report_on
from qlora_lightning.data.files import read_rows
from qlora_lightning.data.formats import RowParser, row_parser
from qlora_lightning.data.hub import fetch
from qlora_lightning.data.prepared import Prepared, prepare, units_of
from qlora_lightning.data.rendering import Renderer, load_renderer
from qlora_lightning.data.rows import Conversation, Located
from qlora_lightning.data.spec import DatasetSpec, MixPart
from qlora_lightning.data.tokenize import Unit, named
from qlora_lightning.data.unchanged import FileState, states_of
from qlora_lightning.errors import UserError

Part = tuple[TokenizedDataset, DataReport]
_PAPER_SEED = 42  # artidoro/qlora: train_test_split(test_size=..., shuffle=True, seed=42), which permutes with numpy's default generator
_STYLE = ("template", "system_prompt", "train_on_source", "compat", "max_length", "truncation", "source_max_length", "target_max_length")


class RowSet(ABC):
    """A set whose rows are read, in training and held-out ones.

    Args:
        spec: the set.
        tokenizer: of the base model.
        seed: of the choice of held-out rows.
        weight: how often an epoch goes through the set.
    """

    _states: dict[str, list[FileState]]
    """Of each local source, its files as they were when the set was opened, which ``_sources`` does."""

    def __init__(self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerFast, seed: int, weight: float = 1.0) -> None:
        self.spec, self.weight = spec, weight
        self._tokenizer, self._seed = tokenizer, seed

    @property
    @abstractmethod
    def everything(self) -> Part:
        """All rows of the training files, those held out of them too."""

    @property
    @abstractmethod
    def training(self) -> Part:
        """The rows to train on."""

    @property
    @abstractmethod
    def validation(self) -> Part | None:
        """The held-out rows; None where there are none, or none of those drawn can be used."""

    @property
    @abstractmethod
    def bad(self) -> list[str]:
        """The errors of rows of the training files that were skipped because they are wrong; the first hundred."""

    def heldout_conversations(self) -> Iterator[Conversation]:
        """The usable held-out conversations up to their last answer, in the order of the rows, which are read anew."""
        training, validation = self._sources
        if not validation and not self.spec.validation_size:
            return
        spec = replace(self.spec, compat="fixed")  # the authors' pairs are no conversations
        rows = self._read(validation or training)
        first = next(rows)
        parser = row_parser(spec, first[1], first[0])
        renderer = load_renderer(spec.template, self._tokenizer)
        held = None if validation else set(self._held.tolist())
        units = units_of(chain([first], rows), parser)
        for unit in units if held is None else islice(units, max(held, default=-1) + 1):
            if held is None or unit.number in held:
                yield from self._usable(parser, renderer, unit)

    def training_conversations(self, rows: Collection[int]) -> dict[int, list[Conversation]]:
        """What these rows of the training files (numbers, from 0) hold, read anew: of each its conversations, also those left out."""
        found = self._read(self._sources[0])
        first = next(found)
        parser = row_parser(self.spec, first[1], first[0])
        units = islice(units_of(chain([first], found), parser), max(rows, default=-1) + 1)
        return {unit.number: parser(unit.row, unit.where)[0] for unit in units if unit.number in rows}

    def _usable(self, parser: RowParser, renderer: Renderer, unit: Unit) -> list[Conversation]:
        """The conversations of a row that can be written out, as in training, and asked."""
        try:
            conversations = [_to_last_answer(conversation) for conversation in parser(unit.row, unit.where)[0]]
            return [one for one in conversations if renderer.render(one) is not None and renderer.prompt(one)]
        except UserError as error:
            if self.spec.bad_rows == "error":
                raise UserError(named(unit.where, error)) from error
            return []

    def _read(self, sources: Sequence[str | Path]) -> Iterator[Located]:
        """The rows of all sources, one after the other; those of local files for as long as they are what they were at first."""
        for source in sources:
            if str(source) not in self._states:
                yield from read_rows(source, self.spec.rows_per_file)
            for state in self._states.get(str(source), []):
                yield from state.rows(self.spec.rows_per_file)

    @property
    @abstractmethod
    def _sources(self) -> tuple[Sequence[str | Path], Sequence[str | Path]]:
        """What the rows are read from, for training and validation."""

    @property
    @abstractmethod
    def _held(self) -> Numbers:
        """Numbers of the rows that are held out of the training files; none where validation has files of its own."""


class InstructionSet(RowSet):
    """A set that is tokenized whole, or found in the cache, when it is first asked for.

    Args:
        processes: how many tokenize.
    """

    def __init__(self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerFast, processes: int, seed: int, weight: float = 1.0) -> None:
        super().__init__(spec, tokenizer, seed, weight)
        self._processes = processes

    @cached_property
    def everything(self) -> Part:
        return self._prepared.whole()

    @cached_property
    def training(self) -> Part:
        rows = np.arange(self._prepared.rows)
        return self._prepared.part(np.setdiff1d(rows, self._held))

    @cached_property
    def validation(self) -> Part | None:
        if self._local[1]:
            return prepare(self._local[1], self.spec, self._tokenizer, self._processes).whole()
        if not self.spec.validation_size or not len(self._prepared.examples.of_rows(self._held)):
            return None
        return self._prepared.part(self._held)

    @property
    def bad(self) -> list[str]:
        return self._prepared.bad

    @property
    def _sources(self) -> tuple[Sequence[str | Path], Sequence[str | Path]]:
        return self._local

    @cached_property
    def _local(self) -> tuple[list[Path], list[Path]]:
        training, validation = fetch(self.spec)
        self._states = {str(file): states_of([file]) for file in (*training, *validation)}
        return training, validation

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare(self._local[0], self.spec, self._tokenizer, self._processes)

    @cached_property
    def _held(self) -> Numbers:
        """Rows are drawn, not conversations: the paths of one tree share their beginnings and must not end up on both sides."""
        size = self.spec.validation_size
        if self._local[1] or not size:
            return np.zeros(0, np.int64)
        rows = self._prepared.rows
        count = int(size) if size >= 1 else min(ceil(size * rows), rows - 1)
        if count >= rows:
            raise UserError(f"data.dataset.validation_size must leave rows to train on, got {size} of {rows} rows; make it smaller")
        generator = np.random.default_rng(_PAPER_SEED if self.spec.compat == "paper" else [self._seed, 0, 1])
        return generator.permutation(rows)[:count]


def with_style_of(main: DatasetSpec, part: MixPart) -> DatasetSpec:
    """A further set of a mix, written out and cut as the main one is: a run has one style."""
    return replace(part.dataset, **{name: getattr(main, name) for name in _STYLE})


def merged(parts: Sequence[tuple[Part, float]]) -> Part:
    """Several sets as one, each with how often an epoch goes through it, and the account of all their rows."""
    dataset = TokenizedDataset.mixed([(examples, weight) for (examples, _), weight in parts])
    skipped: Counter[str] = Counter()
    for (_, report), _ in parts:
        skipped.update(report.skipped)
    return dataset, report_on(dataset, sum(report.rows for (_, report), _ in parts), dict(skipped))


def _to_last_answer(conversation: Conversation) -> Conversation:
    """Without what the user said after the last answer."""
    return conversation[: max(n for n, message in enumerate(conversation) if message.role == "assistant") + 1]
