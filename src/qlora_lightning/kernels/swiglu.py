"""SwiGLU in one pass over memory. Its backward belongs to down_proj's (``lora_backward_swiglu``), which reads the same values."""

import triton
import triton.language as tl
from torch import Tensor

# Columns of a row that a program takes: with four warps, two loads of 16 B from each half of the row a thread.
_BLOCK = 2048
_WARPS = 4


def swiglu(gate_up_N2f: Tensor, out_Nf: Tensor) -> None:
    """See ``reference.swiglu``."""
    tokens, features = out_Nf.shape
    block = min(_BLOCK, triton.next_power_of_2(features))
    parts = triton.cdiv(features, block)
    _swiglu_kernel[(tokens * parts,)](
        gate_up_N2f,
        out_Nf,
        gate_up_N2f.stride(0),
        out_Nf.stride(0),
        FEATURES=features,
        PARTS=parts,
        BLOCK=block,
        num_warps=_WARPS,
    )


@triton.jit
def _swiglu_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # One axis of programs: the others end at 65,535, and neighbours in a row should run at the same time.
    program = tl.program_id(0)
    token = (program // PARTS).to(tl.int64)
    columns = program % PARTS * BLOCK + tl.arange(0, BLOCK)
    inside = columns < FEATURES
    gates = gate_up + token * gate_up_stride + columns
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + FEATURES, mask=inside, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * out_stride + columns, hidden.to(out.dtype.element_ty), mask=inside)
