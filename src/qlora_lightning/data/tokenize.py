"""Conversations to token ids and labels. One rendering, tokenized once; labels come from its character spans.

Shapes: n tokens of an example, E examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow

from qlora_lightning.data.dataset import BAD_ROW, DOUBLED_BOS, LOST_END, RESPELLED, SCHEMA, TRUNCATED, UNSUPERVISED, UNSUPERVISED_LEFT
from qlora_lightning.data.encoder import Encoded, Encoder
from qlora_lightning.data.files import Row
from qlora_lightning.data.formats import RowParser
from qlora_lightning.data.rendering import ConversationRenderer, Rendering
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.truncate import Cut, Mask, truncate
from qlora_lightning.errors import UserError


def answer_mask(tokens: Encoded, spans: Sequence[tuple[int, int]]) -> tuple[Mask, int]:
    """Which tokens [n] belong to the spans, and how many tokens straddle a span's beginning.

    A token belongs to the span in which it starts. One that starts before it is not trained on: the prompt at inference ends at the span,
    so that the model could never write this token. No text token crosses a span's end, where a control token stands.
    """
    mask = np.zeros(len(tokens.ids), dtype=np.bool_)
    straddling = 0
    for start, end in spans:
        first, last = np.searchsorted(tokens.starts, (start, end))
        mask[first:last] = True
        straddling += bool(first > 0 and tokens.ends[first - 1] > start)
    return mask, straddling


def named(where: str, error: UserError) -> str:
    """An error's line, with the row that it is about in front."""
    return str(error) if str(error).startswith(where) else f"{where}: {error}"


class Unit(NamedTuple):
    """One row, or one tree of rows, on its way."""

    number: int
    """From 0, in the order of the files."""
    where: str
    row: Row


@dataclass
class Chunk:
    """What became of some rows."""

    rows: int
    batch: pyarrow.RecordBatch
    """The examples, as ``dataset.SCHEMA`` says."""
    skipped: list[tuple[int, str]]
    """Number of the row, and why it or a conversation of it was left out."""
    bad: list[str]
    """The errors of rows that were skipped because they are wrong."""


@dataclass
class RowTokenizer:
    """Rows to examples: the work of one process. Goes to worker processes, so that it can be pickled.

    Attributes:
        parser: rows to conversations.
        renderer: conversations to text.
        encoder: text to tokens.
        spec: the limits, and what to do about wrong rows.
        bos_id: id of BOS, None where the tokenizer has none.
    """

    parser: RowParser
    renderer: ConversationRenderer
    encoder: Encoder
    spec: DatasetSpec
    bos_id: int | None

    def __call__(self, units: Sequence[Unit]) -> Chunk:
        """Examples in the order of the rows.

        Raises:
            UserError: a row is wrong, and ``spec.bad_rows`` says that this is an error.
        """
        work = _Work()
        pending = [(unit.number, rendering) for unit in units for rendering in self._renderings(unit, work)]
        for (number, rendering), tokens in zip(pending, self.encoder.encode([r for _, r in pending]), strict=True):
            reason = self._add(number, rendering, tokens, work)
            if reason is not None:
                work.skipped.append((number, reason))
        return Chunk(len(units), work.batch(), work.skipped, work.bad)

    def _renderings(self, unit: Unit, work: "_Work") -> list[Rendering]:
        try:
            conversations, reasons = self.parser(unit.row, unit.where)
            renderings = [self.renderer.render(conversation) for conversation in conversations]
        except UserError as error:
            line = named(unit.where, error)
            if self.spec.bad_rows == "error":
                raise UserError(line) from error
            work.bad.append(line)
            reasons, renderings = [BAD_ROW], []
        work.skipped += [(unit.number, reason) for reason in reasons]
        work.skipped += [(unit.number, "chat template rewrites a message") for rendering in renderings if rendering is None]
        return [rendering for rendering in renderings if rendering is not None]

    def _add(self, number: int, rendering: Rendering, tokens: Encoded | None, work: "_Work") -> str | None:
        """Keeps an example; gives the reason where it cannot be kept."""
        if tokens is None:
            return "text spells a control token"
        answer, straddling = answer_mask(tokens, rendering.supervised)
        if not answer.any():
            return UNSUPERVISED
        header = int(np.searchsorted(tokens.starts, rendering.header))
        example = truncate(Cut(tokens.ids, answer), header, rendering.bos, self.spec)
        if example is None:
            return "longer than max_length"
        cut = len(example.ids) < len(tokens.ids)
        if not example.answer[1:].any():
            return UNSUPERVISED_LEFT if cut else UNSUPERVISED
        flags = TRUNCATED * cut + RESPELLED * tokens.respelled + LOST_END * self._lost_end(example) + DOUBLED_BOS * self._doubled(example)
        source = int(np.argmax(example.answer))
        work.add(number, _labelled(example, rendering.bos, self.spec.train_on_source), source, straddling, flags)
        return None

    def _lost_end(self, example: Cut) -> bool:
        """Whether the last token of some answer is not a control token. Asked of the tokens, whatever the limits promise."""
        last = example.answer & ~np.append(example.answer[1:], False)
        return not self.encoder.is_control(example.ids[last]).all()

    def _doubled(self, example: Cut) -> bool:
        return bool(len(example.ids) > 1 and example.ids[0] == example.ids[1] == self.bos_id)


def _labelled(example: Cut, bos: bool, train_on_source: bool) -> Cut:
    """Everything but BOS supervised, or the answers alone; what follows the last answer then has no part in any loss and goes."""
    if train_on_source:
        return Cut(example.ids, np.arange(len(example.ids)) >= int(bos))
    end = len(example.ids) - int(np.argmax(example.answer[::-1]))
    return Cut(example.ids[:end], example.answer[:end])


@dataclass
class _Work:
    """A chunk in the making."""

    examples: list[Cut] = field(default_factory=list)
    columns: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add(self, number: int, example: Cut, source: int, straddling: int, flags: int) -> None:
        self.examples.append(example)
        self.columns.append((number, source, int(example.answer[1:].sum()), straddling, flags))

    def batch(self) -> pyarrow.RecordBatch:
        offsets = np.cumsum([0, *(len(example.ids) for example in self.examples)], dtype=np.int32)
        number, source, targets, straddling, flags = np.array(self.columns, dtype=np.int64).reshape(-1, 5).T
        lists = [
            pyarrow.ListArray.from_arrays(offsets, _flat([e.ids for e in self.examples], np.int32)),
            pyarrow.ListArray.from_arrays(offsets, _flat([e.answer for e in self.examples], np.uint8)),
        ]
        columns = [number, *lists, source.astype(np.int32), targets.astype(np.int32), straddling.astype(np.int32), flags.astype(np.uint8)]
        return pyarrow.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _flat(arrays: list[npt.NDArray[np.generic]], dtype: type) -> npt.NDArray[np.generic]:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
