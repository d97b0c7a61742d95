"""LoRA's first product in one pass over its input: dropout from hashed bits, times A, of all layers that read it.

Memory bound: an input of N x I bf16 is read once (once more where a copy is wanted), the masks are never stored. Programs share the sum
over I where N alone would not fill the device; a second, small launch adds their parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lightning.kernels.dropout import Dropout
from qlora_lightning.kernels.dropout_bits import first_step, kept, random_words, stream_key
from qlora_lightning.kernels.tiling import layer_groups, rank_block, splits, stages

_TOKENS = 128
"""A program's: A is read anew, from L2, for each 128 tokens."""
_FEATURES = 64
"""A step's."""
_ACCUMULATED = 256
"""Columns of the result that a program can hold: 128 registers of each of its 256 threads."""


def lora_project(x_NI: Tensor, a_RI: Tensor, rank: int, dropout: Dropout | None, out_NP: Tensor, copy_NI: Tensor | None = None) -> Tensor:
    """See ``reference.lora_project``; rank is at most 256, every tensor's last dimension contiguous; on a GPU with dropout bf16 only."""
    tokens, features = x_NI.shape
    assert x_NI.dtype == torch.bfloat16 or dropout is None or not x_NI.is_cuda, "Triton would multiply fp32 as TF32"
    ranks = len(a_RI)
    if copy_NI is not None:
        _copy_rows[(tokens, triton.cdiv(features, 2048))](x_NI, copy_NI, features, x_NI.stride(0), copy_NI.stride(0), COLUMNS=2048)
    if dropout is None and x_NI.is_cuda:
        xa_NR = torch.mm(x_NI, a_RI.t())  # nothing to fuse: cuBLAS reads at 3 TB/s here
        _place(xa_NR, 1, 1.0, out_NP, None)
        return xa_NR
    xa_NR = torch.empty(tokens, ranks, dtype=x_NI.dtype, device=x_NI.device)
    blocks, steps = triton.cdiv(tokens, _TOKENS), triton.cdiv(features, _FEATURES)
    # One layer's sums leave registers and shared memory for a second program.
    parts = splits(blocks, steps, 2 if ranks <= 64 else 1, x_NI.device)
    steps_per_part = triton.cdiv(steps, parts)
    partial_SNR = torch.empty(parts, tokens, ranks, dtype=torch.float32, device=x_NI.device)
    for first, layers in layer_groups(ranks // rank, rank, _ACCUMULATED):
        _project[(blocks, parts)](
            x_NI,
            a_RI,
            partial_SNR,
            None if dropout is None else dropout.seed,
            tokens,
            features,
            x_NI.stride(0),
            a_RI.stride(0),
            ranks,
            steps_per_part,
            0 if dropout is None else dropout.stream,
            0 if dropout is None else dropout.first_token,
            RANK=rank,
            RANK_BLOCK=rank_block(rank),
            FIRST=first,
            LAYERS=layers,
            THRESHOLD=0 if dropout is None else dropout.threshold,
            TOKENS=_TOKENS,
            FEATURES=_FEATURES,
            num_warps=8,
            num_stages=stages(4, 2 * _FEATURES * (_TOKENS + layers * rank_block(rank)), 2 * _FEATURES * _TOKENS, x_NI.device),
        )
    _place(partial_SNR, parts, 1.0 if dropout is None else dropout.rescale, out_NP, xa_NR)
    return xa_NR


def _place(partial: Tensor, parts: int, rescale: float, out_NP: Tensor, xa_NR: Tensor | None) -> None:
    """Write the sum over parts, times ``rescale``, behind an input, and to ``xa_NR`` where it is given."""
    tokens, columns = out_NP.shape
    _sum_parts[(triton.cdiv(tokens, 16), triton.cdiv(columns, 64))](
        partial,
        out_NP,
        xa_NR,
        tokens,
        partial.shape[-1],
        columns,
        out_NP.stride(0),
        parts,
        RESCALE=rescale,
        TOKENS=16,
        COLUMNS=64,
        num_warps=4,
    )


@triton.jit
def _copy_rows(x, out, features, x_row, out_row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """By itself, not in ``_project``'s loop: with a store there the sums were wrong on an H200 (Triton 3.6); why is not known."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < features
    tl.store(out + row * out_row + column, tl.load(x + row * x_row + column, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["tokens", "steps", "stream", "first_token"])
def _project(  # type: ignore[no-untyped-def]
    x,
    a,
    partial,
    seed,
    tokens,
    features,
    x_row,
    a_row,
    ranks,
    steps,
    stream,
    first_token,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAYERS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One part of the sum over I of the layers FIRST to FIRST + LAYERS - 1, without the factor 1 / (1 - p)."""
    block, part = tl.program_id(0), tl.program_id(1)
    token = block * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64)[:, None]
    rank = tl.arange(0, RANK_BLOCK)
    present = (token < tokens)[:, None]
    sum_0 = tl.zeros((TOKENS, RANK_BLOCK), tl.float32)
    sum_1 = sum_0
    sum_2 = sum_0
    if THRESHOLD > 0:
        key_low = stream_key(seed, stream + FIRST // 2)
        key_high = stream_key(seed, stream + (FIRST + LAYERS - 1) // 2)
        entry_row = (first_token + token).to(tl.uint32)[:, None] * features.to(tl.uint32)
    begin = part * steps * FEATURES
    for start in range(begin, min(begin + steps * FEATURES, features), FEATURES):
        column = start + tl.arange(0, FEATURES)
        inside = present & (column < features)[None, :]
        x_tile = tl.load(x + row * x_row + column[None, :], mask=inside, other=0.0)
        a_tile = a + FIRST * RANK * a_row + rank[None, :] * a_row + column[:, None]
        a_inside = (column < features)[:, None] & (rank < RANK)[None, :]
        input_0 = x_tile
        input_1 = x_tile
        input_2 = x_tile
        if THRESHOLD > 0:
            stepped = first_step(entry_row + column.to(tl.uint32)[None, :])
            words = random_words(stepped, key_low)
            input_0 = tl.where(kept(words, FIRST % 2, THRESHOLD), x_tile, 0.0)
            if LAYERS > 1:
                input_1 = tl.where(kept(words, 1, THRESHOLD), x_tile, 0.0)
            if LAYERS > 2:
                input_2 = tl.where(kept(random_words(stepped, key_high), 0, THRESHOLD), x_tile, 0.0)
        sum_0 = tl.dot(input_0, tl.load(a_tile, mask=a_inside, other=0.0), sum_0)
        if LAYERS > 1:
            sum_1 = tl.dot(input_1, tl.load(a_tile + RANK * a_row, mask=a_inside, other=0.0), sum_1)
        if LAYERS > 2:
            sum_2 = tl.dot(input_2, tl.load(a_tile + 2 * RANK * a_row, mask=a_inside, other=0.0), sum_2)
    out = partial + (part.to(tl.int64) * tokens + row) * ranks + FIRST * RANK + rank[None, :]
    out_inside = present & (rank < RANK)[None, :]
    tl.store(out, sum_0, mask=out_inside)
    if LAYERS > 1:
        tl.store(out + RANK, sum_1, mask=out_inside)
    if LAYERS > 2:
        tl.store(out + 2 * RANK, sum_2, mask=out_inside)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _sum_parts(  # type: ignore[no-untyped-def]
    partial, out, xa, tokens, ranks, columns, out_row, parts, RESCALE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum over parts, in order; columns from ``ranks`` on become zero."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (token < tokens) & (column < ranks)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for part in range(parts):
        total += tl.load(partial + (part * tokens.to(tl.int64) + token) * ranks + column, mask=inside, other=0.0)
    result = (total * RESCALE).to(out.dtype.element_ty)
    tl.store(out + token * out_row + column, result, mask=(token < tokens) & (column < columns))
    if xa is not None:
        tl.store(xa + token * ranks + column, result, mask=inside)
