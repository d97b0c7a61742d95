"""Examples as text again, cut where supervision begins and ends: what a model sees, and which of it is trained on.

Shapes: n tokens of an example.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_lightning.console import harmless
from qlora_lightning.data.dataset import DOUBLED_BOS, IGNORED, LOST_END, RESPELLED, TRUNCATED, TokenizedDataset, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOTES = {TRUNCATED: "cut to length", RESPELLED: "spells a control token", LOST_END: "lost its end token", DOUBLED_BOS: "two BOS"}
_BLANKS = re.compile("^ +| +$| {2,}", re.MULTILINE)


class Piece(NamedTuple):
    """A run of tokens as text, all of them trained on or none."""

    text: str
    supervised: bool


class Excerpt(NamedTuple):
    """One example for a reader."""

    set: str
    """Name of its instruction set."""
    row: int
    """Number of the row in its file, from 1."""
    text: str
    """All tokens decoded, special ones too."""
    pieces: list[Piece]
    """The text, cut."""
    input_tokens: int
    supervised_tokens: int
    """Tokens that count in the loss."""
    notes: list[str]
    """What is out of the ordinary."""

    @property
    def heading(self) -> str:
        """Where it comes from, and its numbers."""
        notes = f" ({', '.join(self.notes)})" if self.notes else ""
        return f"{self.set}, row {self.row:,}: {self.input_tokens:,} tokens, {self.supervised_tokens:,} supervised{notes}"

    @property
    def supervised(self) -> list[str]:
        """The texts that are trained on."""
        return [piece.text for piece in self.pieces if piece.supervised]


def excerpts(dataset: TokenizedDataset, names: Sequence[str], tokenizer: "PreTrainedTokenizerBase", most: int | None) -> Iterator[Excerpt]:
    """The first ``most`` examples of each set of ``dataset`` (all for None), one after the other.

    Args:
        dataset: the examples.
        names: of its sets.
        tokenizer: that the examples were made with.
        most: so many of each set.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    first = 0
    for name, (number, _) in zip(names, dataset.parts, strict=True):
        for index in range(first, first + (number if most is None else min(number, most))):
            yield _excerpt(dataset, index, name, decode)
        first += number


def _excerpt(dataset: TokenizedDataset, index: int, name: str, decode: Callable[[list[int]], str]) -> Excerpt:
    example, columns = dataset[index], dataset.columns
    pieces = list(_pieces(example, decode))
    notes = [note for bit, note in _NOTES.items() if columns["flags"][index] & bit]
    if columns["straddling"][index]:
        notes.append("boundary token")
    return Excerpt(
        set=name,
        row=int(columns["row"][index]) + 1,
        text=decode(example.input_ids.tolist()),
        pieces=pieces,
        input_tokens=len(example.input_ids),
        supervised_tokens=int(dataset.targets[index]),
        notes=notes,
    )


def supervised_texts(example: TokenizedExample, decode: Callable[[list[int]], str]) -> list[str]:
    """What of an example is trained on, run by run of tokens; ``decode`` gives all text of some ids, special tokens too."""
    return [piece.text for piece in _pieces(example, decode) if piece.supervised]


def _pieces(example: TokenizedExample, decode: Callable[[list[int]], str]) -> Iterator[Piece]:
    """Cut out of the decoded beginnings: tokens decoded by themselves would lose the blank that their first one carries."""
    ids, trained = example.input_ids.tolist(), example.labels != IGNORED
    starts = np.flatnonzero(np.diff(trained, prepend=~trained[:1])).tolist()
    before = ""
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        until = decode(ids[:end])
        yield Piece(until[len(before) :], bool(trained[start]))
        before = until


def visible(text: str) -> str:
    """``harmless``, with what a reader would overlook: ``⏎`` at line ends, ``→`` at tabs, ``·`` for blanks at edges and in runs."""
    return _BLANKS.sub(lambda blanks: "·" * len(blanks[0]), harmless(text)).replace("\t", "→\t").replace("\n", "⏎\n")
