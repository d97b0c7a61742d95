"""Activations and frozen weights in e4m3, one scale a row, for products on tensor cores of 8 bits. ``fp8_reference`` says what is computed.

The weights go from 4 bits to e4m3 in one pass of 1.5 bytes a value, of which only the layout that the next product reads is made: both
operands of a product in e4m3 must lie with the dimension that is summed over contiguous, so that forward reads W and backward W^T.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lightning.kernels.fp8_reference import E4M3, LARGEST, SMALLEST
from qlora_lightning.kernels.quantized import BLOCK, NESTED_BLOCK, QuantizedWeight

_IN_REGISTERS = 16384
"""Columns of a row that a program holds at once; a wider row is read twice, the second time from L2."""
_WORD = 8
"""4-bit values in a word of 32 bits."""
_THREADS = 256
_TILE = 4 * _THREADS
"""Words that a program of ``dequantize_fp8`` decodes: four a thread, which hide each other's latency."""
_ROWS = 64
_WORDS = 16
"""A tile of ``dequantize_fp8_transposed``: 64 bytes of each of 64 rows in, 64 bytes of each of 128 rows out, both whole sectors. 32 values
a thread fit in 64 registers, so that four programs share an SM and one's barriers hide behind the others' work."""


def quantize_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in e4m3 by its own largest magnitude; rows may be further apart than I.

    Returns:
        [N, I] e4m3, and the scales [N] fp32: a row is about its e4m3 values times its scale.
    """
    tokens, features = x_NI.shape
    assert x_NI.stride(1) == 1
    out_NI = torch.empty(tokens, features, dtype=E4M3, device=x_NI.device)
    scale_N = torch.empty(tokens, dtype=torch.float32, device=x_NI.device)
    parts = triton.cdiv(features, _IN_REGISTERS)
    block = triton.next_power_of_2(triton.cdiv(features, parts))
    _quantize_rows_kernel[(tokens,)](
        x_NI,
        x_NI.stride(0),
        out_NI,
        scale_N,
        FEATURES=features,
        PARTS=parts,
        BLOCK=block,
        LARGEST=LARGEST,
        SMALLEST=SMALLEST,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return out_NI, scale_N


@triton.jit
def _quantize_rows_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    source = x + row * x_stride + columns
    target = out + row * FEATURES + columns
    value = tl.load(source, columns < FEATURES, 0)
    absmax = tl.max(tl.abs(value.to(tl.float32)), 0)
    for part in tl.static_range(1, PARTS):
        value = tl.load(source + part * BLOCK, columns + part * BLOCK < FEATURES, 0)
        absmax = tl.maximum(absmax, tl.max(tl.abs(value.to(tl.float32)), 0))
    scale = tl.div_rn(tl.maximum(absmax, SMALLEST), LARGEST)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales + row, scale)
    # The part that is still in registers first.
    for back in tl.static_range(PARTS):
        inside = columns + (PARTS - 1 - back) * BLOCK < FEATURES
        if back > 0:
            value = tl.load(source + (PARTS - 1 - back) * BLOCK, inside, 0)
        tl.store(target + (PARTS - 1 - back) * BLOCK, (value.to(tl.float32) * inverse).to(out.dtype.element_ty), inside)


def dequantize_fp8(weights: Sequence[QuantizedWeight], inverse_O: Tensor, out_OI: Tensor) -> None:
    """Write 4-bit weights below one another in e4m3, each row times its factor.

    Args:
        weights: of one or more linear layers with the same input.
        inverse_O: 1 / scale of each row, fp32.
        out_OI: e4m3; their rows in order, I apart.
    """
    assert out_OI.is_contiguous()
    first = 0
    for weight in weights:
        rows, columns = weight.shape
        _dequantize_fp8_kernel[(triton.cdiv(rows * columns, _WORD * _TILE),)](
            out_OI[first:],
            inverse_O[first:],
            weight.packed,
            weight.code,
            weight.absmax,
            weight.nested_code,
            weight.nested_absmax,
            weight.nested_offset,
            ROWS=rows,
            COLUMNS=columns,
            BLOCK=BLOCK,
            NESTED_BLOCK=NESTED_BLOCK,
            TILE=_TILE,
            THREADS=_THREADS,
            num_warps=_THREADS // 32,
            enable_fp_fusion=False,  # absmax's product and sum are rounded one by one, as bitsandbytes does
        )
        first += rows


def dequantize_fp8_transposed(weights: Sequence[QuantizedWeight], inverse_I: Tensor, out_IO: Tensor) -> None:
    """Write the transpose of the weights below one another in e4m3, each input feature times its factor.

    Args:
        weights: as in ``dequantize_fp8``.
        inverse_I: 1 / scale of each input feature, fp32.
        out_IO: e4m3; contiguous.
    """
    assert out_IO.is_contiguous()
    first = 0
    for weight in weights:
        rows, columns = weight.shape
        _dequantize_fp8_transposed_kernel[(triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _WORD * _WORDS),)](
            out_IO[:, first:],
            out_IO.stride(0),
            inverse_I,
            weight.packed,
            weight.code,
            weight.absmax,
            weight.nested_code,
            weight.nested_absmax,
            weight.nested_offset,
            ROWS=rows,
            COLUMNS=columns,
            BLOCK=BLOCK,
            NESTED_BLOCK=NESTED_BLOCK,
            TILE_ROWS=_ROWS,
            TILE_WORDS=_WORDS,
            num_warps=_THREADS // 32,
            enable_fp_fusion=False,
        )
        first += rows


@triton.jit
def _dequantize_fp8_kernel(
    out: tl.tensor,
    inverses: tl.tensor,
    packed: tl.tensor,
    code: tl.tensor,
    absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_offset: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    parts: tl.constexpr = TILE // THREADS
    word = tl.program_id(0) * TILE + tl.arange(0, parts)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    inside = word < ROWS * (COLUMNS // 8)
    value = _codes(packed, code, word, inside, parts, THREADS)
    factor = _absmax(absmax, nested_code, nested_absmax, nested_offset, word // (BLOCK // 8), inside, NESTED_BLOCK)
    value = value * factor[:, :, None] * tl.load(inverses + word // (COLUMNS // 8), inside, 0)[:, :, None]
    target = word.to(tl.int64)[:, :, None] * 8 + tl.arange(0, 8)
    tl.store(out + target, value.to(out.dtype.element_ty), inside[:, :, None])


@triton.jit
def _dequantize_fp8_transposed_kernel(
    out: tl.tensor,
    out_stride: tl.tensor,
    inverses: tl.tensor,
    packed: tl.tensor,
    code: tl.tensor,
    absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_offset: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
) -> None:
    # Tiles of the same columns follow one another: together they write whole rows of the transpose.
    tiles_of_rows: tl.constexpr = (ROWS + TILE_ROWS - 1) // TILE_ROWS
    tile = tl.program_id(0)
    row = tile % tiles_of_rows * TILE_ROWS + tl.arange(0, TILE_ROWS)
    word_of_row = tile // tiles_of_rows * TILE_WORDS + tl.arange(0, TILE_WORDS)
    inside = (row < ROWS)[:, None] & (word_of_row < COLUMNS // 8)[None, :]
    word = row[:, None] * (COLUMNS // 8) + word_of_row[None, :]
    value = _codes(packed, code, word, inside, TILE_ROWS, TILE_WORDS)
    factor = _absmax(absmax, nested_code, nested_absmax, nested_offset, word // (BLOCK // 8), inside, NESTED_BLOCK)
    value = tl.reshape(value * factor[:, :, None], [TILE_ROWS, TILE_WORDS * 8])
    column = tile // tiles_of_rows * (TILE_WORDS * 8) + tl.arange(0, TILE_WORDS * 8)
    value = value * tl.load(inverses + column, column < COLUMNS, 0)[None, :]
    value = tl.trans(value.to(out.dtype.element_ty))
    target = column.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(out + target, value, (column < COLUMNS)[:, None] & (row < ROWS)[None, :])


@triton.jit
def _codes(packed: tl.tensor, code: tl.tensor, word: tl.tensor, inside: tl.tensor, FIRST: tl.constexpr, SECOND: tl.constexpr) -> tl.tensor:
    """[FIRST, SECOND, 8] fp32: the values of the 4-bit type in the words numbered ``word``, before their absmax."""
    table = tl.load(code + tl.arange(0, 16))
    bits = tl.load(packed.to(tl.pointer_type(tl.uint32), bitcast=True) + word, inside, 0, eviction_policy="evict_first")
    # Bytes lie in a word from its low end; of each, the high half comes first.
    nibble = (bits[:, :, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, None, :]) & 15
    value = tl.gather(table, tl.reshape(nibble, [FIRST * SECOND * 8]).to(tl.int32), 0)
    return tl.reshape(value, [FIRST, SECOND, 8])


@triton.jit
def _absmax(
    absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_offset: tl.tensor,
    block: tl.tensor,
    inside: tl.tensor,
    NESTED_BLOCK: tl.constexpr,
) -> tl.tensor:
    """The absmax of the blocks numbered ``block``."""
    scale = tl.load(absmax + block, inside, 0)
    if nested_code is not None:
        outer, offset = tl.load(nested_absmax + block // NESTED_BLOCK, inside, 0), tl.load(nested_offset)
        scale = tl.load(nested_code + scale) * outer + offset
    return scale
