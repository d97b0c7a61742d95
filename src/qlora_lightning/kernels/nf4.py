"""4-bit weights and LoRA's B, written as the matrices that a product reads: one launch for all layers that read one input.

``dequantize`` moves 2.5 bytes a value, so that instructions must stay few. A thread takes 8 values: one 4-byte word in, 16 bytes out, so
that the 32 words of a warp are adjacent and its stores are whole lines. The 16 values of the 4-bit type lie in shared memory, one in each
bank, where a lookup costs one instruction without conflicts; a tree of selects would cost fifteen, and a lookup by pointer 64-bit
addresses. absmax is decoded where it is used: bitsandbytes writes it to memory in a launch of its own.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from qlora_lightning.kernels.quantized import BLOCK, NESTED_BLOCK, QuantizedWeight

_WORD = 8
"""4-bit values in a word of 32 bits."""
_THREADS = 256
_TILE = 4 * _THREADS
"""Words that a program decodes: four a thread, which hide each other's latency within 32 registers, so that an SM is full."""
_B_ROWS = 32
_B_COLUMNS = 64


def dequantize(weights: Sequence[QuantizedWeight], out_OI: Tensor) -> None:
    """Write 4-bit weights below one another, bit for bit what bitsandbytes gives in ``out_OI``'s dtype.

    Args:
        weights: of one or more linear layers with the same input, all with or all without double quantisation; I is a multiple of 64.
        out_OI: their rows in order; rows may be further apart than I, best by a multiple of 16 (which wide stores need).
    """
    columns = out_OI.shape[1]
    assert columns % BLOCK == 0 and out_OI.stride(1) == 1
    assert all(weight.shape[1] == columns for weight in weights)
    rows = tuple(weight.shape[0] for weight in weights)
    _dequantize_kernel[(sum(triton.cdiv(count * columns, _WORD * _TILE) for count in rows),)](
        out_OI,
        out_OI.stride(0),
        tuple((weight.packed, weight.code, weight.absmax) for weight in weights),
        tuple((weight.nested_code, weight.nested_absmax, weight.nested_offset) for weight in weights),
        ROWS=rows,
        COLUMNS=columns,
        NESTED=weights[0].nested_code is not None,
        BLOCK=BLOCK,
        NESTED_BLOCK=NESTED_BLOCK,
        TILE=_TILE,
        THREADS=_THREADS,
        num_warps=_THREADS // 32,
        enable_fp_fusion=False,  # absmax's product and sum are rounded one by one, as bitsandbytes does
    )


@triton.jit
def _dequantize_kernel(
    out: tl.tensor,
    out_stride: tl.tensor,
    weights: tl.tuple,
    nested: tl.tuple,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    words_of_row: tl.constexpr = COLUMNS // 8
    tile = tl.program_id(0)
    # Which weight: the last one whose first tile is not behind this one.
    packed, code, absmax = weights[0]
    nested_code, nested_absmax, nested_offset = nested[0]
    count = ROWS[0] * words_of_row
    start = 0
    first_row = 0
    start_of_next: tl.constexpr = 0
    first_row_of_next: tl.constexpr = 0
    for number in tl.static_range(1, len(ROWS)):
        start_of_next = start_of_next + (ROWS[number - 1] * words_of_row + TILE - 1) // TILE
        first_row_of_next = first_row_of_next + ROWS[number - 1]
        if tile >= start_of_next:
            packed, code, absmax = weights[number]
            nested_code, nested_absmax, nested_offset = nested[number]
            count = ROWS[number] * words_of_row
            start = start_of_next
            first_row = first_row_of_next
    word = (tile - start) * TILE + tl.arange(0, TILE // THREADS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    inside = word < count
    table = tl.load(code + tl.arange(0, 16))
    # Packed weights are read once a pass: they should not push out of L2 what the next product reads.
    bits = tl.load(packed.to(tl.pointer_type(tl.uint32), bitcast=True) + word, inside, 0, eviction_policy="evict_first")
    block = word // (BLOCK // 8)
    scale = tl.load(absmax + block, inside, 0)
    if NESTED:
        outer, offset = tl.load(nested_absmax + block // NESTED_BLOCK, inside, 0), tl.load(nested_offset)
        scale = tl.load(nested_code + scale) * outer + offset
    # Bytes lie in a word from its low end; of each, the high half comes first.
    place = tl.arange(0, 8)
    nibble = (bits[:, :, None] >> ((place ^ 1) * 4)[None, None, :]) & 15
    value = tl.gather(table, tl.reshape(nibble, [TILE * 8]).to(tl.int32), 0)
    value = tl.reshape(value, [TILE // THREADS, THREADS, 8]) * scale[:, :, None]
    row = word // words_of_row
    target = (first_row + row).to(tl.int64) * out_stride + (word - row * words_of_row) * 8
    tl.store(out + target[:, :, None] + place[None, None, :], value.to(out.dtype.element_ty), inside[:, :, None])


def place_lora_b(b_Or: Tensor, sizes: Sequence[int], scale: float, out_OP: Tensor) -> None:
    """Write scale * B of several layers as one block-diagonal matrix: the rows of layer j fill columns j * r to (j + 1) * r.

    Args:
        b_Or: B of the layers below one another, fp32, contiguous.
        sizes: output features of each; their sum is O.
        scale: alpha / r.
        out_OP: every entry is written; rows may be further apart than P.
    """
    assert b_Or.is_contiguous() and out_OP.stride(1) == 1
    rows, columns = out_OP.shape
    _place_lora_b_kernel[(triton.cdiv(rows, _B_ROWS), triton.cdiv(columns, _B_COLUMNS))](
        out_OP,
        out_OP.stride(0),
        b_Or,
        scale,
        SIZES=tuple(sizes),
        RANK=b_Or.shape[1],
        COLUMNS=columns,
        BLOCK_ROWS=_B_ROWS,
        BLOCK_COLUMNS=_B_COLUMNS,
    )


@triton.jit
def _place_lora_b_kernel(
    out: tl.tensor,
    out_stride: tl.tensor,
    b: tl.tensor,
    scale: tl.tensor,
    SIZES: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    layer = tl.zeros([BLOCK_ROWS, 1], tl.int32)
    end: tl.constexpr = 0
    for number in tl.static_range(len(SIZES)):
        end = end + SIZES[number]
        if number < len(SIZES) - 1:
            layer += (row >= end).to(tl.int32)
    inside = (row < end) & (column < COLUMNS)
    source = column - layer * RANK
    value = tl.load(b + row * RANK + source, inside & (source >= 0) & (source < RANK), 0) * scale
    tl.store(out + row.to(tl.int64) * out_stride + column, value.to(out.dtype.element_ty), inside)
