"""Tokenized examples, read where they lie: in memory-mapped Arrow, so that a set of any size costs some bytes an example.

Shapes: n tokens of an example, E examples.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow

from qlora_lightning.data.truncate import Ints

IGNORED = -100  # torch's ignore_index: no loss on this token

TRUNCATED, RESPELLED, LOST_END, DOUBLED_BOS = 1, 2, 4, 8
"""Bits of an example's ``flags``: a limit cut it; a message spells a control token, kept as text; an answer without its end
token; two BOS."""

BAD_ROW, UNSUPERVISED, UNSUPERVISED_LEFT = "bad row", "no supervised token", "no supervised token left after truncation"
"""Why a row or a conversation of it was left out, where that points to a mistake: the audit asks for these by name."""

SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.int64(),  # number of the row that the example came from, from 0
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "supervised": pyarrow.list_(pyarrow.uint8()),  # 1 where a token is trained on; a byte each, so that it can be read in place
        "source_tokens": pyarrow.int32(),  # tokens before the first answer
        "targets": pyarrow.int32(),  # tokens that are predicted: supervised ones, less a first token, which nothing predicts
        "straddling": pyarrow.int32(),  # tokens that begin before an answer and end in it: the encoder makes none
        "flags": pyarrow.uint8(),
    }
)
"""Tokenized examples, one a row."""

Numbers = npt.NDArray[np.int64]
_COLUMNS = ("row", "source_tokens", "targets", "straddling", "flags")


class TokenizedExample(NamedTuple):
    """One example: input_ids [n] int32 and labels [n] int32, -100 where there is no loss. The ids are a view, not to be written to."""

    input_ids: Ints
    labels: Ints


class _Tokens(NamedTuple):
    """The tokens of one record batch, end to end."""

    ids: Ints
    supervised: npt.NDArray[np.uint8]
    check: Callable[[], None] | None
    """Raises UserError where they can no longer be read."""


class TokenizedDataset:
    """Examples of one set, of some of its rows, or of several sets one after the other.

    Attributes:
        lengths: tokens of each example [E].
        targets: tokens of each example that are predicted [E]: supervised ones, less a first token, which nothing predicts.
        columns: more about each example [E]: ``row``, ``source_tokens``, ``straddling`` and ``flags`` of ``SCHEMA``.
        parts: the sets: how many examples each has, and how often an epoch goes through them.
    """

    def __init__(
        self,
        tokens: Sequence[_Tokens],
        chunk_of: Numbers,
        starts: Numbers,
        lengths: Numbers,
        columns: dict[str, Numbers],
        content: str,
        parts: list[tuple[int, float]] | None = None,
    ) -> None:
        self._tokens, self._chunk_of, self._starts, self._content = tokens, chunk_of, starts, content
        self.lengths, self.columns, self.targets = lengths, columns, columns["targets"]
        self.parts = [(len(lengths), 1.0)] if parts is None else parts

    @classmethod
    def from_batches(
        cls, batches: Iterable[pyarrow.RecordBatch], content: str, check: Callable[[], None] | None = None
    ) -> "TokenizedDataset":
        """A set over record batches of ``SCHEMA``, whose memory it uses.

        Args:
            batches: the examples.
            content: tells it from any other.
            check: called before each example is read, raises UserError where the batches' memory can no longer be read; None where they
                lie in memory.
        """
        filled = [batch for batch in batches if batch.num_rows]
        offsets = [batch["input_ids"].offsets.to_numpy().astype(np.int64) for batch in filled]
        return cls(
            [_Tokens(batch["input_ids"].values.to_numpy(), batch["supervised"].values.to_numpy(), check) for batch in filled],
            np.repeat(np.arange(len(filled)), [batch.num_rows for batch in filled]).astype(np.int64),
            _join([part[:-1] for part in offsets]),
            _join([np.diff(part) for part in offsets]),
            {name: _join([batch[name].to_numpy() for batch in filled]) for name in _COLUMNS},
            content,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        tokens, start = self._tokens[self._chunk_of[index]], self._starts[index]
        if tokens.check is not None:
            tokens.check()
        part = slice(start, start + self.lengths[index])
        ids = tokens.ids[part]
        return TokenizedExample(ids, np.where(tokens.supervised[part], ids, IGNORED).astype(np.int32))

    def rows_of(self, examples: Numbers) -> list[Numbers]:
        """The rows that these examples come from, of each set in turn: their numbers, from 0, sorted."""
        set_of = np.searchsorted(np.cumsum([count for count, _ in self.parts]), examples, side="right")
        return [np.unique(self.columns["row"][examples[set_of == number]]) for number in range(len(self.parts))]

    def of_rows(self, rows: Numbers) -> "TokenizedDataset":
        """The examples of these rows, in their order."""
        chosen = np.flatnonzero(np.isin(self.columns["row"], rows))
        columns = {name: column[chosen] for name, column in self.columns.items()}
        content = hashlib.sha256(self._content.encode() + chosen.tobytes()).hexdigest()
        return TokenizedDataset(self._tokens, self._chunk_of[chosen], self._starts[chosen], self.lengths[chosen], columns, content)

    @staticmethod
    def mixed(sets: Sequence[tuple["TokenizedDataset", float]]) -> "TokenizedDataset":
        """Several sets one after the other, each with how often an epoch goes through it."""
        if len(sets) == 1:
            return sets[0][0]
        first_chunk = np.cumsum([0, *(len(part._tokens) for part, _ in sets)])
        return TokenizedDataset(
            [tokens for part, _ in sets for tokens in part._tokens],
            np.concatenate([part._chunk_of + first for (part, _), first in zip(sets, first_chunk, strict=False)]),
            np.concatenate([part._starts for part, _ in sets]),
            np.concatenate([part.lengths for part, _ in sets]),
            {name: np.concatenate([part.columns[name] for part, _ in sets]) for name in _COLUMNS},
            hashlib.sha256(repr([(part._content, weight) for part, weight in sets]).encode()).hexdigest(),
            [(len(part), weight) for part, weight in sets],
        )

    def fingerprint(self) -> str:
        """A hash (hex) of everything a run can see of a prepared set: ids, labels, borders and order. Empty for a part of a stream."""
        return self._content


def _join(arrays: list[npt.NDArray[np.generic]]) -> Numbers:
    return np.concatenate([np.zeros(0, np.int64), *arrays]).astype(np.int64)


@dataclass
class DataReport:
    """What became of the rows. Lengths and counts are in tokens unless the name says otherwise."""

    rows: int
    kept: int
    """Examples to train on; a row may give several."""
    skipped: dict[str, int]
    """Why a row or conversation was left out -> how many."""
    truncated: int
    """Examples that a length limit cut."""
    respelled: int
    """Examples in which a message spells a control token, kept as plain text."""
    lost_ends: int
    """Examples with an answer that is trained on without its end token."""
    doubled_bos: int
    """Examples that open with two BOS tokens."""
    straddling_tokens: int
    """Tokens that begin before an answer and end in it: not trained on."""
    tokens: int
    supervised_tokens: int
    """Predicted tokens that count in the loss."""
    length_min: int
    length_median: float
    length_max: int


def report_on(dataset: TokenizedDataset, rows: int, skipped: dict[str, int]) -> DataReport:
    """The account of a set of at least one example, made from ``rows`` rows of which ``skipped`` left something out."""
    lengths, flags = dataset.lengths, dataset.columns["flags"]
    return DataReport(
        rows=rows,
        kept=len(dataset),
        skipped=skipped,
        truncated=_count(flags, TRUNCATED),
        respelled=_count(flags, RESPELLED),
        lost_ends=_count(flags, LOST_END),
        doubled_bos=_count(flags, DOUBLED_BOS),
        straddling_tokens=int(dataset.columns["straddling"].sum()),
        tokens=int(lengths.sum()),
        supervised_tokens=int(dataset.targets.sum()),
        length_min=int(lengths.min()),
        length_median=float(np.median(lengths)),
        length_max=int(lengths.max()),
    )


def _count(flags: Numbers, bit: int) -> int:
    return int(np.count_nonzero(flags & bit))
