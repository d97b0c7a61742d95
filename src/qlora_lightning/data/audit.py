"""What a set of tokenized examples adds up to, and what in it would spoil training. Numbers only.

Shapes: n tokens of an example, E examples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.dataset import BAD_ROW, UNSUPERVISED, UNSUPERVISED_LEFT, DataReport, Numbers, TokenizedDataset
from qlora_lightning.data.packing import row_tokens
from qlora_lightning.data.steps import StepShape, plan_epoch, split_step

_STEPS = 2000  # of an epoch, whose padding tells that of the rest
_BUCKETS = 15  # of a histogram at most

SPOILED = {
    BAD_ROW: "bad rows, skipped",
    UNSUPERVISED: "rows without a supervised token",
    UNSUPERVISED_LEFT: "rows without a supervised token left after truncation",
}
"""Reasons for leaving rows out that point to a mistake -> what they are called in ``problems``."""

SET_COLUMNS = ("set", "weight", "rows", "examples", "tokens", "of an epoch's rows", "of its examples", "of its tokens")
"""Over ``SetShare.cells``."""


@dataclass(frozen=True)
class Bucket:
    """One bar of a histogram: how many examples have ``first`` to ``last`` tokens, both included."""

    first: int
    last: int
    examples: int


@dataclass(frozen=True)
class Lengths:
    """How long examples are, in tokens. Half of them have at most ``p50``, 95 % at most ``p95``."""

    p50: int
    p95: int
    max: int
    histogram: list[Bucket]


@dataclass(frozen=True)
class Padding:
    """The share of a run's batches that is padding, by how their examples are chosen."""

    random: float
    """Examples in random order."""
    grouped: float
    """Steps of examples of like length (data.group_by_length)."""
    packed: float
    """Examples end to end in rows (data.packing)."""


@dataclass(frozen=True)
class SetShare:
    """One set of a mix. Shares are of what an epoch goes through, the weights included."""

    name: str
    weight: float
    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    rows_share: float
    examples_share: float
    tokens_share: float

    def cells(self) -> list[str]:
        """A line of a table."""
        counts = (self.rows, self.examples, self.tokens)
        shares = (self.rows_share, self.examples_share, self.tokens_share)
        return [self.name, f"{self.weight:g}", *(f"{number:,}" for number in counts), *(f"{share:.1%}" for share in shares)]


@dataclass(frozen=True)
class Audit:
    """The account of the training files' rows, or of the training or the validation part."""

    part: str
    rows: int
    """Rows read."""
    rows_used: int
    """Rows that gave at least one example."""
    examples: int
    skipped: dict[str, int]
    """Why a row or conversation was left out -> how many."""
    bad_rows: list[str]
    """The errors of rows that were skipped because they are wrong; the first hundred."""
    truncated: int
    """Examples that a length limit cut."""
    lost_ends: int
    """Examples with an answer that is trained on without its end token."""
    doubled_bos: int
    """Examples that open with two BOS."""
    boundary_tokens: int
    """Tokens that begin before an answer and end in it: not trained on."""
    respelled: int
    """Examples in which a message spells a control token, kept as plain text."""
    duplicates: int
    """Examples whose tokens an earlier example has too."""
    also_in_validation: int
    """Examples of this part (of all: of the training part) whose tokens are both in the training and in the validation part."""
    tokens: int
    supervised_tokens: int
    """Tokens that count in the loss."""
    supervised_share: float
    lengths: dict[str, Lengths]
    """source (before the first answer), target (from there on) and total."""
    padding_waste: Padding | None
    """None for validation, which has one order only."""
    layout: str | None
    """Which of them the run has: random, grouped or packed."""
    sets: list[SetShare]

    @property
    def problems(self) -> list[str]:
        """What spoils training, a line each with its number; [] where nothing does."""
        found = {name: self.skipped.get(reason, 0) for reason, name in SPOILED.items()}
        found |= {
            "examples with an answer that lost its end token": self.lost_ends,
            "examples that open with two BOS": self.doubled_bos,
            "boundary tokens (they begin before an answer and end in it)": self.boundary_tokens,
            "examples in both the training and the validation part": self.also_in_validation,
        }
        return [f"{name}: {number:,}" for name, number in found.items() if number]

    def lines(self) -> list[tuple[str, str]]:
        """The counts for a reader, each with its name, in the order in which to read them."""
        shares = {} if self.padding_waste is None else asdict(self.padding_waste)
        padding = [f"{share:.1%} {name}{' (this run)' if name == self.layout else ''}" for name, share in shares.items()]
        lines = [
            ("part", self.part),
            ("rows", f"{self.rows:,} read, {self.rows_used:,} used"),
            ("examples", f"{self.examples:,}"),
            ("left out", ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items()) or "nothing"),
            ("cut to length", f"{self.truncated:,} examples"),
            ("lost end tokens", f"{self.lost_ends:,} examples"),
            ("doubled BOS", f"{self.doubled_bos:,} examples"),
            ("boundary tokens", f"{self.boundary_tokens:,}"),
            ("respelled", f"{self.respelled:,} examples in which a message spells a control token, kept as text"),
            ("duplicates", f"{self.duplicates:,} examples equal to an earlier one"),
            ("in both parts", f"{self.also_in_validation:,} examples are in the training and the validation part"),
            ("tokens", f"{self.tokens:,}"),
            ("supervised", f"{self.supervised_tokens:,} = {self.supervised_share:.1%}"),
        ]
        return [*lines, ("padding", ", ".join(padding))] if padding else lines

    def summary(self) -> dict[str, Any]:
        """Everything as plain values for JSON, ``problems`` included."""
        return {**asdict(self), "problems": self.problems}


def audit(
    part: str,
    dataset: TokenizedDataset,
    report: DataReport,
    also_in_validation: int,
    bad_rows: list[str],
    padding: Padding | None,
    layout: str | None,
    sets: list[SetShare],
) -> Audit:
    """The account of a part.

    Args:
        part: "all", "train" or "validation".
        dataset: its examples, at least one.
        report: what became of its rows.
        also_in_validation: see ``Audit``.
        bad_rows: see ``Audit``.
        padding: of the part's batches; None where it is not trained on.
        layout: see ``Audit``.
        sets: see ``set_shares``.
    """
    own, source = np.unique(_digests(dataset)), dataset.columns["source_tokens"]
    return Audit(
        part=part,
        rows=report.rows,
        rows_used=_rows_used(dataset),
        examples=report.kept,
        skipped=report.skipped,
        bad_rows=bad_rows,
        truncated=report.truncated,
        lost_ends=report.lost_ends,
        doubled_bos=report.doubled_bos,
        boundary_tokens=report.straddling_tokens,
        respelled=report.respelled,
        duplicates=len(dataset) - len(own),
        also_in_validation=also_in_validation,
        tokens=report.tokens,
        supervised_tokens=report.supervised_tokens,
        supervised_share=round(report.supervised_tokens / report.tokens, 4),
        lengths={
            "source": summarize(source),
            "target": summarize(dataset.lengths - source),
            "total": summarize(dataset.lengths),
        },
        padding_waste=padding,
        layout=layout,
        sets=sets,
    )


def in_both(examples: TokenizedDataset, others: TokenizedDataset) -> int:
    """How many of the examples have the tokens of one of the others."""
    return int(np.isin(_digests(examples), _digests(others)).sum())


def _digests(dataset: TokenizedDataset) -> npt.NDArray[np.uint64]:
    """A hash of each example's tokens [E]."""
    hashes = (blake2b(dataset[index].input_ids.tobytes(), digest_size=8).digest() for index in range(len(dataset)))
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)


def _rows_used(dataset: TokenizedDataset) -> int:
    """Each set of a mix numbers its own rows."""
    borders = np.cumsum([number for number, _ in dataset.parts])[:-1]
    return sum(len(np.unique(rows)) for rows in np.split(dataset.columns["row"], borders))


def summarize(lengths: Numbers) -> Lengths:
    """Quantiles, each the length of some example, and a histogram of ``lengths`` [E]."""
    p50, p95 = np.quantile(lengths, (0.5, 0.95), method="inverted_cdf").tolist()
    return Lengths(p50, p95, int(lengths.max()), histogram(lengths))


def histogram(lengths: Numbers) -> list[Bucket]:
    """Buckets from 0 to the longest of ``lengths`` [E], of the narrowest width of 1, 2 or 5 times a power of ten that suffices."""
    longest = int(lengths.max())
    widths = (digit * 10**power for power in count() for digit in (1, 2, 5))
    width = next(width for width in widths if longest // width < _BUCKETS)
    counts = np.bincount(lengths // width).tolist()
    return [Bucket(number * width, (number + 1) * width - 1, examples) for number, examples in enumerate(counts)]


def padding_waste(dataset: TokenizedDataset, shape: StepShape, multiple: int, seed: int, group_by_length: bool) -> float:
    """The share of padding among all places of the first epoch's batches (of 2,000 steps at most).

    Args:
        dataset: the examples.
        shape: how a step is divided, packed or not.
        multiple: each batch is as wide as its longest row, rounded up to a multiple of this.
        seed: of the order.
        group_by_length: steps of examples of like length.
    """
    lengths, size = dataset.lengths, shape.global_batch_size
    tokens = places = 0
    for step in plan_epoch(lengths, size, seed, 0, group_by_length, dataset.parts)[:_STEPS]:
        for rows in split_step(step, lengths, shape.microbatches, size, pack_length=shape.pack_length):
            widths = [row_tokens(row, lengths) for row in rows]
            tokens += sum(widths)
            places += len(rows) * -(-max(widths) // multiple) * multiple
    return round(1 - tokens / places, 4)


def set_shares(sets: Sequence[tuple[str, DataReport, float]]) -> list[SetShare]:
    """The sets of a mix, from each one's name, the account of its rows, and how often an epoch goes through it."""
    rows, examples, tokens = (sum(getattr(report, name) * weight for _, report, weight in sets) for name in ("rows", "kept", "tokens"))
    return [
        SetShare(
            name=name,
            weight=weight,
            rows=report.rows,
            examples=report.kept,
            tokens=report.tokens,
            supervised_tokens=report.supervised_tokens,
            rows_share=round(report.rows * weight / rows, 4),
            examples_share=round(report.kept * weight / examples, 4),
            tokens_share=round(report.tokens * weight / tokens, 4),
        )
        for name, report, weight in sets
    ]
