"""The masks' bits: as likely as asked for, independent of one another, and the same in the kernels."""

import math

import pytest
import torch
import triton
import triton.language as tl
from nearness import DEVICE

from qlora_lightning.kernels.dropout import Dropout, dropout_key, dropped, keep_mask
from qlora_lightning.kernels.dropout_bits import first_step, kept, random_words, stream_key

TOKENS, COLUMNS = 333, 1536
SEEDS = [0, 1, 2**32, -1, 2**62 + 12345]


def mask(seed: int = 7, stream: int = 0, layer: int = 0, p: float = 0.1) -> torch.Tensor:
    return keep_mask(Dropout(p, torch.tensor([seed]), stream), layer, TOKENS, COLUMNS)


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of two equally large sets of numbers, in standard deviations of what independence would give."""
    return float(torch.corrcoef(torch.stack([left.flatten().double(), right.flatten().double()]))[0, 1]) * math.sqrt(left.numel())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_share_dropped_is_p_in_all_and_by_row_and_column(p: float, layer: int) -> None:
    dropout = Dropout(p, torch.tensor([7]), 4)
    assert dropout.threshold / 65536 == pytest.approx(p, abs=2**-17)
    deviation = mask(stream=4, layer=layer, p=p).double() - (1 - dropout.threshold / 65536)
    variance = p * (1 - p)
    assert abs(deviation.sum()) < 4 * math.sqrt(variance * TOKENS * COLUMNS)
    for dimension, length in enumerate((TOKENS, COLUMNS)):
        # Mean squares of independent sums, themselves about normal.
        sums = deviation.sum(dimension)
        assert sums.square().mean() / (variance * length) == pytest.approx(1, abs=5 * math.sqrt(2 / len(sums)))


def test_masks_of_layers_streams_and_seeds_are_independent() -> None:
    masks = [mask(layer=layer, p=0.5) for layer in range(4)] + [mask(stream=stream, p=0.5) for stream in (2, 4, 6, 400)]
    masks += [mask(seed=seed, p=0.5) for seed in SEEDS]
    for number, left in enumerate(masks):
        for right in masks[:number]:
            assert abs(correlation(left, right)) < 4.5


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (0, 2), (0, 64), (1, 0), (1, 1), (2, 0), (64, 0)])
def test_neighbours_are_independent(rows: int, columns: int) -> None:
    bits = mask(p=0.5)
    assert abs(correlation(bits[: TOKENS - rows, : COLUMNS - columns], bits[rows:, columns:])) < 4


def test_layers_share_a_streams_words_by_halves() -> None:
    assert mask(stream=5, layer=0).equal(mask(stream=4, layer=2))
    assert mask(stream=5, layer=1).equal(mask(stream=4, layer=3))


def test_what_is_kept_is_enlarged() -> None:
    dropout = Dropout(0.25, torch.tensor([7]), 0)
    assert dropped(torch.ones(3, 64), dropout, 1).unique().tolist() == [0, pytest.approx(4 / 3)]


@triton.jit(do_not_specialize=["stream"])
def _masks(seed, stream, entries, out, THRESHOLD: tl.constexpr, COUNT: tl.constexpr):
    entry = tl.arange(0, COUNT)
    words = random_words(first_step(tl.load(entries + entry).to(tl.uint32)), stream_key(seed, stream))
    tl.store(out + entry, kept(words, 0, THRESHOLD))
    tl.store(out + COUNT + entry, kept(words, 1, THRESHOLD))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("p", "stream"), [(0.1, 0), (0.9, 447)])
def test_kernels_see_the_same_bits(seed: int, p: float, stream: int) -> None:
    dropout = Dropout(p, torch.tensor([seed], device=DEVICE), stream)
    entries = torch.arange(64 * 64, device=DEVICE)
    masks = torch.zeros(2, 64 * 64, dtype=torch.int8, device=DEVICE)
    _masks[(1,)](dropout.seed, stream, entries, masks, THRESHOLD=dropout.threshold, COUNT=64 * 64)
    for layer in range(2):
        assert masks[layer].bool().view(64, 64).equal(keep_mask(dropout, layer, 64, 64))
    assert 0 <= int(dropout_key(dropout.seed, stream)) < 2**32
