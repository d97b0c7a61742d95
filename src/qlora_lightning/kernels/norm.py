"""Residual sum and RMSNorm in one pass over memory, forward and backward.

A program holds whole rows in registers, so every value is read once and written once. The weights (fp32) and the statistics stay in the
caches. Shapes as in ``kernels/reference.py``: N tokens, d hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a row that a thread holds: two loads of 16 B in bf16. More would cost the backward, which holds four rows, its occupancy.
_PER_THREAD = 16
# Values that a program holds at least: narrow rows are taken several at a time.
_PER_PROGRAM = 2048


def add_rms_norm(x_Nd: Tensor, delta_Nd: Tensor | None, weight_d: Tensor, eps: float, out_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.add_rms_norm``."""
    tokens, features = x_Nd.shape
    rstd_N = torch.empty(tokens, dtype=torch.float32, device=x_Nd.device)
    rows, block, warps = _tile(features)
    _add_rms_norm_kernel[(triton.cdiv(tokens, rows),)](
        x_Nd,
        delta_Nd,
        weight_d,
        rstd_N,
        out_Nd,
        tokens,
        x_Nd.stride(0),
        0 if delta_Nd is None else delta_Nd.stride(0),
        out_Nd.stride(0),
        eps,
        FEATURES=features,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return x_Nd if delta_Nd is None else delta_Nd, rstd_N


def rms_norm_backward(dy_Nd: Tensor, x_Nd: Tensor, rstd_N: Tensor, weight_d: Tensor, dx_Nd: Tensor) -> None:
    """See ``reference.rms_norm_backward``."""
    tokens, features = x_Nd.shape
    rows, block, warps = _tile(features)
    _rms_norm_backward_kernel[(triton.cdiv(tokens, rows),)](
        dy_Nd,
        x_Nd,
        rstd_N,
        weight_d,
        dx_Nd,
        tokens,
        dy_Nd.stride(0),
        x_Nd.stride(0),
        dx_Nd.stride(0),
        FEATURES=features,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )


def _tile(features: int) -> tuple[int, int, int]:
    """Rows and columns that a program holds (powers of two), and its warps."""
    block = triton.next_power_of_2(features)
    rows = max(1, _PER_PROGRAM // block)
    return rows, block, min(16, rows * block // (32 * _PER_THREAD))


@triton.jit(do_not_specialize=["tokens"])
def _add_rms_norm_kernel(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    present = rows < tokens
    inside = present[:, None] & (columns < FEATURES)
    # A row's offset may pass 2^31 values; a column's never does.
    row = rows.to(tl.int64)[:, None]
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if delta is not None:
        added = tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # Asked for before the sum needs all of the row, so that it is there when the sum is.
    weights = tl.load(weight + columns, mask=columns < FEATURES, other=0.0, eviction_policy="evict_last")
    if delta is not None:
        values = (values.to(tl.float32) + added).to(out.dtype.element_ty)
        tl.store(delta + row * delta_stride + columns, values, mask=inside)
    wide = values.to(tl.float32)
    # Rounded once each: one statistic's error is the error of a whole row.
    scales = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(wide * wide, 1), FEATURES) + eps))
    tl.store(rstd + rows, scales, mask=present)
    normalised = (wide * scales[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, (normalised.to(tl.float32) * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _rms_norm_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    tokens: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    dx_stride: tl.tensor,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    present = rows < tokens
    inside = present[:, None] & (columns < FEATURES)
    row = rows.to(tl.int64)[:, None]
    gradients = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    scales = tl.load(rstd + rows, mask=present, other=0.0)[:, None]
    past = tl.load(dx + row * dx_stride + columns, mask=inside, other=0.0)
    weights = tl.load(weight + columns, mask=columns < FEATURES, other=0.0, eviction_policy="evict_last")
    weighted = gradients.to(tl.float32) * weights
    normalised = values.to(tl.float32) * scales
    mean = tl.sum(weighted * normalised, 1) / FEATURES
    through = (weighted - normalised * mean[:, None]) * scales
    tl.store(dx + row * dx_stride + columns, (past.to(tl.float32) + through).to(dx.dtype.element_ty), mask=inside)
