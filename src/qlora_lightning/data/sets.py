"""One instruction set of a run: its files prepared, and which of its rows are held out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from math import ceil
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.dataset import DataReport, Numbers, TokenizedDataset, report_on
from qlora_lightning.data.formats import Conversation, RowParser, gather, row_parser
from qlora_lightning.data.hub import fetch
from qlora_lightning.data.prepared import Prepared, prepare, read_files
from qlora_lightning.data.rows import Row
from qlora_lightning.data.spec import DatasetSpec, MixPart
from qlora_lightning.errors import UserError

Part = tuple[TokenizedDataset, DataReport]
_PAPER_SEED = 42  # artidoro/qlora: train_test_split(test_size=..., shuffle=True, seed=42), which permutes with numpy's default generator
_STYLE = ("template", "system_prompt", "train_on_source", "compat", "max_length", "truncation", "source_max_length", "target_max_length")


class InstructionSet:
    """Files are read, and tokenized or found in the cache, when they are first asked for.

    Args:
        spec: the set.
        tokenizer: of the base model.
        processes: how many tokenize.
        seed: of the choice of held-out rows.
        weight: how often an epoch goes through the set.
    """

    def __init__(self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerFast, processes: int, seed: int, weight: float = 1.0) -> None:
        self.spec, self.weight = spec, weight
        self._tokenizer, self._processes, self._seed = tokenizer, processes, seed

    @cached_property
    def training(self) -> Part:
        """The rows to train on."""
        rows = np.arange(self._prepared.rows)
        return self._prepared.part(np.setdiff1d(rows, self._held))

    @property
    def everything(self) -> Part:
        """All rows of the training files, those held out of them too."""
        return self._prepared.part(np.arange(self._prepared.rows))

    @cached_property
    def validation(self) -> Part | None:
        """The held-out rows; None where there are none, or none of those drawn can be used."""
        if self._local[1]:
            prepared = prepare(self._local[1], self.spec, self._tokenizer, self._processes)
            return prepared.part(np.arange(prepared.rows))
        if not self.spec.validation_size or not len(self._prepared.examples.of_rows(self._held)):
            return None
        return self._prepared.part(self._held)

    @property
    def bad(self) -> list[str]:
        """The errors of rows of the training files that were skipped because they are wrong; the first hundred."""
        return self._prepared.bad

    def heldout_conversations(self) -> Iterator[Conversation]:
        """The usable held-out conversations up to their last answer, in the order of the rows, which are read anew."""
        if not self._sources[1] and not self.spec.validation_size:
            return
        spec = replace(self.spec, compat="fixed")  # the authors' pairs are no conversations
        training, validation = self._sources
        rows = read_files(validation or training, spec)
        first = next(rows)
        parser = row_parser(spec, first[1], first[0])
        held = None if validation else set(self._held.tolist())
        for number, (where, row) in enumerate(gather(chain([first], rows), parser)):
            if held is None or number in held:
                yield from map(_to_last_answer, self._usable(parser, row, where))

    def _usable(self, parser: RowParser, row: Row, where: str) -> list[Conversation]:
        try:
            return parser(row, where)[0]
        except UserError:
            if self.spec.bad_rows == "error":
                raise
            return []

    @property
    def _sources(self) -> tuple[Sequence[str | Path], Sequence[str | Path]]:
        """What the rows are read from, for training and validation."""
        return self._local

    @cached_property
    def _local(self) -> tuple[list[Path], list[Path]]:
        return fetch(self.spec)

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
