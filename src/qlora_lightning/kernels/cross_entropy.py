"""Cross-entropy and its gradient in one launch, where the logits stand: neither a copy in fp32 nor the probabilities are ever held.

A program owns a row and reads it twice: for the maximum and the sum of exponentials, then, mostly from L2, for the gradient. Within the
first pass each thread keeps a maximum and a sum of its own, so that threads meet once a row and not once a piece of it. Rows of up to
256 KB that are in work at one time stay within an H200's L2: long rows have one program a multiprocessor, others two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lightning.kernels.reference import IGNORED

_PIECE = 8
"""Adjacent columns of a thread: 16 bytes of 2-byte logits."""
_UNROLL = 4
"""Pieces that a thread has in flight."""
_WIDE = 65536
"""Columns from which a program fills a multiprocessor."""
_LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * this): ``tl.exp`` is four instructions longer, for results below the smallest normal number."""
_LOWEST = tl.constexpr(-1.0e38)
"""What a thread's maximum starts from: finite, since it may see nothing but minus infinity, and infinities have no difference."""


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Each row's cross-entropy; ``logits_NV`` becomes its gradient (softmax minus the target's one), for the next product.

    Args:
        logits_NV: in the compute dtype; rows may be further apart than V.
        targets_N: int64; a row whose target is -100 has loss 0 and gradient 0.

    Returns:
        [N] fp32.
    """
    assert logits_NV.stride(1) == 1 and targets_N.is_contiguous()
    rows, columns = logits_NV.shape
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    warps = 32 if columns >= _WIDE else 16 if columns > 8192 else 4
    _cross_entropy_kernel[(rows,)](
        logits_NV,
        logits_NV.stride(0),
        targets_N,
        losses_N,
        COLUMNS=columns,
        IGNORED=IGNORED,
        UNROLL=_UNROLL,
        THREADS=warps * 32,
        PIECE=_PIECE,
        num_warps=warps,
    )
    return losses_N


@triton.jit
def _cross_entropy_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    COLUMNS: tl.constexpr,
    IGNORED: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * row_stride
    # [UNROLL, THREADS, PIECE]: the last dimension and the first lie within a thread.
    step: tl.constexpr = UNROLL * THREADS * PIECE
    lane = (tl.arange(0, UNROLL)[:, None] * THREADS + tl.arange(0, THREADS)[None, :])[:, :, None] * PIECE + tl.arange(0, PIECE)
    target = tl.load(targets + number)
    if target == IGNORED:
        tl.store(losses + number, 0.0)
        for start in tl.range(0, COLUMNS, step):
            tl.store(row + start + lane, tl.zeros([UNROLL, THREADS, PIECE], row.dtype.element_ty), start + lane < COLUMNS)
    else:
        # Read before any thread writes: the reductions below are barriers.
        target_logit = tl.load(row + target).to(tl.float32)
        highest = tl.full([THREADS], _LOWEST, tl.float32)
        total = tl.zeros([THREADS], tl.float32)
        for start in tl.range(0, COLUMNS, step):
            value = tl.load(row + start + lane, start + lane < COLUMNS, float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(tl.max(value, 2), 0))
            sums = tl.sum(tl.sum(tl.exp2((value - higher[None, :, None]) * _LOG2_E), 2), 0)
            total = total * tl.exp2((highest - higher) * _LOG2_E) + sums
            highest = higher
        top = tl.max(highest, 0)
        total = tl.sum(total * tl.exp2((highest - top) * _LOG2_E), 0)
        tl.store(losses + number, tl.log2(total) / _LOG2_E - (target_logit - top))
        # Backwards: what was read last is the surest to be in L2 still.
        last: tl.constexpr = (COLUMNS - 1) // step
        share = 1 / total
        hit = target.to(tl.int32)
        for piece in tl.range(0, last + 1):
            column = (last - piece) * step + lane
            value = tl.load(row + column, column < COLUMNS, float("-inf")).to(tl.float32)
            gradient = tl.exp2((value - top) * _LOG2_E) * share - (column == hit).to(tl.float32)
            tl.store(row + column, gradient.to(row.dtype.element_ty), column < COLUMNS)
