"""The account of a set against numbers that can be counted by hand."""

from typing import Any

import numpy as np
import pyarrow
import pytest

from qlora_lightning.data.audit import Audit, Bucket, audit, histogram, in_both, padding_waste, set_shares, summarize
from qlora_lightning.data.dataset import DOUBLED_BOS, LOST_END, RESPELLED, SCHEMA, TRUNCATED, TokenizedDataset, report_on
from qlora_lightning.data.steps import StepShape


def example(row: int, source: int, target: int, first: int = 100, flags: int = 0, straddling: int = 0) -> dict[str, Any]:
    """An example of row ``row`` (from 0) that counts up from the token ``first``; all of its target is supervised."""
    ids = list(range(first, first + source + target))
    supervised = [0] * source + [1] * target
    return {
        "row": row,
        "input_ids": ids,
        "supervised": supervised,
        "source_tokens": source,
        "targets": sum(supervised[1:]),
        "straddling": straddling,
        "flags": flags,
    }


def dataset(*examples: dict[str, Any]) -> TokenizedDataset:
    return TokenizedDataset.from_batches([pyarrow.RecordBatch.from_pylist(list(examples), SCHEMA)], "")


def of_length(*lengths: int) -> TokenizedDataset:
    return dataset(*(example(row, 0, length) for row, length in enumerate(lengths)))


def account(part: TokenizedDataset, other: TokenizedDataset | None = None, rows: int = 9, skipped: dict[str, int] | None = None) -> Audit:
    return audit("train", part, report_on(part, rows, skipped or {}), in_both(part, other) if other else 0, [], None, None, [])


def test_rows_examples_and_tokens_are_counted() -> None:
    found = account(dataset(example(0, 4, 2), example(0, 3, 1, first=7), example(5, 0, 10)), rows=6, skipped={"empty answer": 4})
    assert (found.rows, found.rows_used, found.examples, found.skipped) == (6, 2, 3, {"empty answer": 4})
    assert (found.tokens, found.supervised_tokens) == (20, 2 + 1 + 9)  # nothing predicts an example's first token
    assert found.supervised_share == 0.6
    assert [found.lengths[name].max for name in ("source", "target", "total")] == [4, 10, 10]


def test_sets_of_a_mix_number_their_rows_apart() -> None:
    mixed = TokenizedDataset.mixed([(dataset(example(0, 1, 1), example(1, 1, 1)), 1.0), (dataset(example(1, 1, 2)), 2.0)])
    assert account(mixed).rows_used == 3


def test_duplicates_are_examples_whose_tokens_came_before() -> None:
    found = account(dataset(example(0, 4, 2), example(1, 3, 3), example(2, 4, 2), example(3, 4, 3)))
    assert found.duplicates == 2  # rows 1 and 2; the fourth is longer
    assert found.problems == []  # a set may well say something twice


def test_examples_in_both_parts_are_counted_and_spoil() -> None:
    train = dataset(example(0, 4, 2), example(1, 4, 2), example(2, 4, 2, first=50))
    held = dataset(example(7, 4, 2), example(8, 9, 9))
    assert account(train, held).also_in_validation == 2
    assert account(held, train).also_in_validation == 1
    assert account(train, held).problems == ["examples in both the training and the validation part: 2"]
    assert account(train).also_in_validation == 0


def test_what_spoils_training_is_named_with_its_number() -> None:
    flagged = dataset(
        example(0, 4, 2, flags=LOST_END | TRUNCATED),
        example(1, 4, 3, flags=DOUBLED_BOS),
        example(2, 4, 4, straddling=2),
        example(3, 4, 5, flags=RESPELLED),
        example(4, 4, 6, flags=TRUNCATED),
    )
    skipped = {"bad row": 3, "no supervised token": 4, "no supervised token left after truncation": 5, "empty answer": 6}
    found = account(flagged, skipped=skipped)
    assert (found.lost_ends, found.doubled_bos, found.boundary_tokens, found.respelled, found.truncated) == (1, 1, 2, 1, 2)
    assert [int(line.rpartition(" ")[2]) for line in found.problems] == [3, 4, 5, 1, 1, 2]
    assert account(dataset(example(0, 4, 2, flags=TRUNCATED | RESPELLED)), skipped={"empty answer": 1}).problems == []


def test_the_summary_is_plain_json() -> None:
    summary = account(dataset(example(0, 4, 2, flags=LOST_END))).summary()
    assert summary["problems"] == ["examples with an answer that lost its end token: 1"]
    assert summary["lengths"]["target"] == {
        "p50": 2,
        "p95": 2,
        "max": 2,
        "histogram": [*empty(0, 1), {"first": 2, "last": 2, "examples": 1}],
    }


def empty(*lengths: int) -> list[dict[str, int]]:
    return [{"first": n, "last": n, "examples": 0} for n in lengths]


def test_quantiles_are_lengths_of_examples() -> None:
    found = summarize(np.array([1] * 50 + [30] * 45 + [70] * 5))
    assert (found.p50, found.p95, found.max) == (1, 30, 70)


@pytest.mark.parametrize(
    ("longest", "width", "buckets"), [(0, 1, 1), (14, 1, 15), (15, 2, 8), (128, 10, 13), (300, 50, 7), (2048, 200, 11)]
)
def test_a_histogram_has_round_buckets(longest: int, width: int, buckets: int) -> None:
    found = histogram(np.array([0, 0, longest]))
    assert len(found) == buckets
    assert [(bucket.first, bucket.last) for bucket in found] == [(n * width, n * width + width - 1) for n in range(buckets)]
    assert sum(bucket.examples for bucket in found) == 3


def test_a_histogram_counts_both_ends() -> None:
    assert histogram(np.array([0, 1, 2, 19, 20])) == [
        *(Bucket(n, n + 1, {0: 2, 2: 1, 18: 1, 20: 1}.get(n, 0)) for n in range(0, 22, 2)),
    ]


@pytest.mark.parametrize(
    ("microbatches", "pack_length", "waste"),
    [
        (1, None, 1 - 20 / 32),  # one batch, 8 wide
        (2, None, 1 - 20 / 24),  # 8 and 8 together, 3 and 1 in a batch that is 4 wide
        (1, 8, 1 - 20 / 24),  # 8, 8 and 3 + 1 as one row
        (1, 12, 0.1667),  # two rows of 11 and 9 tokens, 12 wide
    ],
)
def test_padding_is_that_of_the_runs_batches(microbatches: int, pack_length: int | None, waste: float) -> None:
    shape = StepShape(4, microbatches, pack_length=pack_length)
    assert padding_waste(of_length(1, 3, 8, 8), shape, 4, 0, group_by_length=False) == pytest.approx(waste, abs=1e-4)


def test_grouping_and_packing_save_padding() -> None:
    lengths = of_length(*(1 + n * n % 97 for n in range(400)))
    random, grouped = (padding_waste(lengths, StepShape(8, 2), 8, 42, group) for group in (False, True))
    packed = padding_waste(lengths, StepShape(8, 2, pack_length=256), 8, 42, True)
    assert 0.2 < random < 0.5
    assert packed < grouped < 0.1


def test_an_epoch_goes_through_the_weights_of_a_mix() -> None:
    """The second set, twice an epoch, is all that makes padding: its examples are short beside the first set's."""
    long, short = of_length(8, 8), of_length(4)
    mixed = TokenizedDataset.mixed([(long, 1.0), (short, 2.0)])
    assert padding_waste(mixed, StepShape(4, 1), 1, 0, group_by_length=False) == 1 - 24 / 32


def test_shares_of_a_mix_follow_the_weights() -> None:
    reports = [report_on(of_length(10, 20), 3, {}), report_on(of_length(5), 1, {})]
    first, second = set_shares([("a", reports[0], 1.0), ("b", reports[1], 2.0)])
    assert (first.rows, first.examples, first.tokens, first.supervised_tokens) == (3, 2, 30, 28)
    assert (first.rows_share, first.examples_share, first.tokens_share) == (0.6, 0.5, 0.75)
    assert second.cells() == ["b", "2", "1", "1", "5", "40.0%", "50.0%", "25.0%"]
