"""What is left of a group's backward after its big products, in one pass: the gradient through LoRA's A, and A's own.

With dY @ [W | scale * B] at hand, per layer j of the group: dX += mask_j o (dXA_j A_j) and dA_j = dXA_j^T (mask_j o y). A program owns a
block of columns and walks over tokens, so A's block and its gradient's stay on chip; x and dX are read once and every mask is hashed once.
Before down_proj the same pass computes y = silu(gate) * up again and goes on to gate's and up's gradients.

Tiles stand transposed, [column, token]: a mask then meets both of its uses (the result of A_j^T dXA_j^T, and the left factor of
y_j^T dXA_j) in the same threads, and its bits are computed once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lightning.kernels.dropout import Dropout
from qlora_lightning.kernels.dropout_bits import first_step, kept, random_words, stream_key
from qlora_lightning.kernels.tiling import layer_groups, rank_block, splits, stages

_FEATURES = 64
"""Columns of a tile. A program of so many reads dXA anew, from L2: 2 R bytes for 6 * 64 of x, dX and its result."""
_ACCUMULATED = 384
"""Rows of A's gradient that 256 threads can hold: 96 registers of each."""
_PLAIN, _NORMED, _SWIGLU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def lora_backward(
    dcat: Tensor,
    x_NI: Tensor,
    a_RI: Tensor,
    rank: int,
    dropout: Dropout | None,
    grad_a_RI: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    input_needed: bool = True,
) -> None:
    """See ``reference.lora_backward``; rank is at most 256, every tensor's last dimension contiguous, ``grad_a_RI`` contiguous."""
    _launch(dcat, x_NI, a_RI, rank, dropout, grad_a_RI, norm, _PLAIN.value if norm is None else _NORMED.value, input_needed)


def lora_backward_swiglu(dcat: Tensor, gate_up_N2f: Tensor, a_rf: Tensor, dropout: Dropout | None, grad_a_rf: Tensor) -> None:
    """See ``reference.lora_backward_swiglu``; as for ``lora_backward``."""
    _launch(dcat, gate_up_N2f, a_rf, len(a_rf), dropout, grad_a_rf, None, _SWIGLU.value, True)


def lora_grad_b(dy_NO: Tensor, xa_NR: Tensor, rank: int, sizes: Sequence[int], scale: float, grad_b_Or: Tensor) -> None:
    """See ``reference.lora_grad_b``: one product of cuBLAS a layer, summed in fp32 and never rounded to the inputs' dtype."""
    product_Or = torch.empty_like(grad_b_Or)
    for number, (dy, out) in enumerate(zip(dy_NO.split(list(sizes), 1), product_Or.split(list(sizes)), strict=True)):
        xa_Nr = xa_NR[:, number * rank : (number + 1) * rank]
        if dy.is_cuda and dy.dtype != torch.float32:
            torch.mm(dy.t(), xa_Nr, out_dtype=torch.float32, out=out)
        else:
            torch.mm(dy.t().float(), xa_Nr.float(), out=out)
    grad_b_Or.add_(product_Or, alpha=scale)


def _launch(
    dcat: Tensor,
    x: Tensor,
    a_RI: Tensor,
    rank: int,
    dropout: Dropout | None,
    grad_a_RI: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    source: int,
    store: bool,
) -> None:
    tokens, (ranks, features) = len(x), a_RI.shape
    for first, layers in layer_groups(ranks // rank, rank, _ACCUMULATED):
        columns = layers * rank_block(rank)
        deep, warps, ahead, resident = _tile(columns, layers, source, masked=dropout is not None)
        blocks, steps = triton.cdiv(features, _FEATURES), triton.cdiv(tokens, deep)
        parts = splits(blocks, steps, resident, x.device)
        partial_SRI = torch.empty(parts, layers * rank, features, dtype=torch.float32, device=x.device)
        _backward[(blocks, parts)](
            dcat,
            x,
            a_RI,
            partial_SRI,
            None if norm is None else norm[0],
            None if norm is None else norm[1],
            None if dropout is None else dropout.seed,
            tokens,
            features,
            dcat.stride(0),
            x.stride(0),
            a_RI.stride(0),
            triton.cdiv(steps, parts),
            0 if dropout is None else dropout.stream,
            0 if dropout is None else dropout.first_token,
            RANK=rank,
            RANK_BLOCK=rank_block(rank),
            FIRST=first,
            LAYERS=layers,
            THRESHOLD=0 if dropout is None else dropout.threshold,
            SOURCE=source,
            STORE=store,
            FEATURES=_FEATURES,
            TOKENS=deep,
            num_warps=warps,
            num_stages=stages(ahead, 2 * deep * columns, 2 * _FEATURES * (columns + 2 * deep), x.device),
        )
        entries = layers * rank * features
        _add_parts[(triton.cdiv(entries, 1024),)](
            partial_SRI,
            grad_a_RI[first * rank :],
            entries,
            parts,
            RESCALE=1.0 if dropout is None else dropout.rescale,
            ENTRIES=1024,
            num_warps=4,
        )


def _tile(columns: int, layers: int, source: int, masked: bool) -> tuple[int, int, int, int]:
    """Tokens of a tile, warps, stages, and programs that a multiprocessor is meant to run at a time.

    The fastest of 15 on an H200 at LLaMA-7B's shapes and rank 64 (benchmarks/2026-11-23-kernels-h200.md): two stages leave registers and
    shared memory for one more program than three, and 64 tokens halve the loop's overhead where no mask is hashed.
    """
    if columns > _ACCUMULATED // 2:
        return 32, 8, 3, 1
    if source == _SWIGLU.value:
        return (32, 4, 2, 3) if masked else (64, 4, 2, 2)
    if layers == 1 or (masked and layers == 3):
        return 32, 4, 2, 4
    return 64, 4, 2, 2


@triton.jit
def _true(tile):  # type: ignore[no-untyped-def]
    """True everywhere, in the threads that hold the fp32 ``tile``. Only LLVM finds that out, after Triton has divided the work: it is free.

    What is selected by it moves to the threads where a matrix product leaves its result, and is computed once for all of its uses; and
    what a product waits for in this way is loaded two steps ahead.
    """
    return ((tile.to(tl.int32, bitcast=True) << 16) & 0xFFFF) == 0


@triton.jit(do_not_specialize=["tokens", "steps", "stream", "first_token"])
def _backward(  # type: ignore[no-untyped-def]
    dcat,
    x,
    a,
    partial,
    rstd,
    weight,
    seed,
    tokens,
    features,
    dcat_row,
    x_row,
    a_row,
    steps,
    stream,
    first_token,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAYERS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SOURCE: tl.constexpr,
    STORE: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A block of columns and one part of the tokens, for the layers FIRST to FIRST + LAYERS - 1; A's gradient without 1 / (1 - p)."""
    block, part = tl.program_id(0), tl.program_id(1)
    column = (block * FEATURES + tl.arange(0, FEATURES))[:, None]
    rank = tl.arange(0, RANK_BLOCK)
    a_tile = a + FIRST * RANK * a_row + rank[None, :] * a_row + column
    a_inside = (column < features) & (rank < RANK)[None, :]
    a_0 = tl.load(a_tile, mask=a_inside, other=0.0)
    grad_0 = tl.zeros((FEATURES, RANK_BLOCK), tl.float32)
    if LAYERS > 1:
        a_1 = tl.load(a_tile + RANK * a_row, mask=a_inside, other=0.0)
        grad_1 = grad_0
    if LAYERS > 2:
        a_2 = tl.load(a_tile + 2 * RANK * a_row, mask=a_inside, other=0.0)
        grad_2 = grad_0
    if SOURCE == _NORMED:
        weights = tl.load(weight + column, mask=column < features, other=0.0)
    if THRESHOLD > 0:
        key_low = stream_key(seed, stream + FIRST // 2)
        key_high = stream_key(seed, stream + (FIRST + LAYERS - 1) // 2)
    beside_product = _true(tl.dot(a_0, tl.zeros((RANK_BLOCK, TOKENS), a_0.dtype)))
    entry_column = tl.where(beside_product, column.to(tl.uint32), 0)
    begin = part * steps * TOKENS
    for start in range(begin, min(begin + steps * TOKENS, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = token.to(tl.int64)
        inside = (column < features) & (token < tokens)[None, :]
        # y^T, what the group's layers read.
        x_tile = x + row[None, :] * x_row + column
        y = tl.where(beside_product, tl.load(x_tile, mask=inside, other=0.0), 0.0)
        if SOURCE == _NORMED:
            rstds = tl.load(rstd + token, mask=token < tokens, other=0.0)[None, :]
            y = ((y.to(tl.float32) * rstds).to(y.dtype) * weights).to(y.dtype)
        if SOURCE == _SWIGLU:
            gate = y.to(tl.float32)
            up = tl.where(beside_product, tl.load(x_tile + features, mask=inside, other=0.0), 0.0).to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-gate))
            y = (gate * sigmoid * up).to(y.dtype)
        dx_tile = dcat + row[None, :] * dcat_row + column
        if STORE:
            dx = tl.load(dx_tile, mask=inside, other=0.0).to(tl.float32)
            y = tl.where(_true(dx), y, 0.0)
        dxa_tile = dcat + row[:, None] * dcat_row + features + FIRST * RANK + rank[None, :]
        dxa_inside = (token < tokens)[:, None] & (rank < RANK)[None, :]
        dxa_0 = tl.load(dxa_tile, mask=dxa_inside, other=0.0)
        if LAYERS > 1:
            dxa_1 = tl.load(dxa_tile + RANK, mask=dxa_inside, other=0.0)
        if LAYERS > 2:
            dxa_2 = tl.load(dxa_tile + 2 * RANK, mask=dxa_inside, other=0.0)
        if STORE:
            # Asked for first, so that the tensor cores work on them while the masks are hashed.
            through_0 = tl.dot(a_0, tl.trans(dxa_0))
            if LAYERS > 1:
                through_1 = tl.dot(a_1, tl.trans(dxa_1), None if THRESHOLD > 0 else through_0)
            if LAYERS > 2:
                through_2 = tl.dot(a_2, tl.trans(dxa_2), None if THRESHOLD > 0 else through_1)
        if THRESHOLD > 0:
            stepped = first_step((first_token + token).to(tl.uint32)[None, :] * features.to(tl.uint32) + entry_column)
            words = random_words(stepped, key_low)
            keep = kept(words, FIRST % 2, THRESHOLD)
            grad_0 = tl.dot(tl.where(keep, y, 0.0), dxa_0, grad_0)
            if STORE:
                through = tl.where(keep, through_0, 0.0)
            if LAYERS > 1:
                keep = kept(words, 1, THRESHOLD)
                grad_1 = tl.dot(tl.where(keep, y, 0.0), dxa_1, grad_1)
                if STORE:
                    through += tl.where(keep, through_1, 0.0)
            if LAYERS > 2:
                keep = kept(random_words(stepped, key_high), 0, THRESHOLD)
                grad_2 = tl.dot(tl.where(keep, y, 0.0), dxa_2, grad_2)
                if STORE:
                    through += tl.where(keep, through_2, 0.0)
            if STORE:
                dx += through * (65536 / (65536 - THRESHOLD))
        else:
            grad_0 = tl.dot(y, dxa_0, grad_0)
            if LAYERS > 1:
                grad_1 = tl.dot(y, dxa_1, grad_1)
            if LAYERS > 2:
                grad_2 = tl.dot(y, dxa_2, grad_2)
            if STORE:
                dx += through_2 if LAYERS > 2 else through_1 if LAYERS > 1 else through_0
        if SOURCE == _SWIGLU:
            tl.store(x_tile, (dx * up * sigmoid * (1 + gate * (1 - sigmoid))).to(y.dtype), mask=inside)
            tl.store(x_tile + features, (dx * gate * sigmoid).to(y.dtype), mask=inside)
        elif STORE:
            tl.store(dx_tile, dx.to(y.dtype), mask=inside)
    out = partial + (part * LAYERS * RANK + rank[None, :]).to(tl.int64) * features + column
    tl.store(out, grad_0, mask=a_inside)
    if LAYERS > 1:
        tl.store(out + RANK * features, grad_1, mask=a_inside)
    if LAYERS > 2:
        tl.store(out + 2 * RANK * features, grad_2, mask=a_inside)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(partial, grad, entries, parts, RESCALE: tl.constexpr, ENTRIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the sum over parts, in order, to the gradient."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < entries
    total = tl.zeros((ENTRIES,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * entries.to(tl.int64) + entry, mask=inside, other=0.0)
    tl.store(grad + entry, tl.load(grad + entry, mask=inside) + total * RESCALE, mask=inside)
