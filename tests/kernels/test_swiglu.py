"""SwiGLU against the reference."""

import pytest
import torch
from nearness import DEVICE, apart, assert_near

from qlora_lightning.kernels import reference
from qlora_lightning.kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(7, 24), (5, 1536), (3, 5504)])
def test_swiglu_equals_the_reference(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(tokens, 2 * width, device=DEVICE)).to(dtype)
    out, between = apart(tokens, width, 64, dtype)
    plain, exact = torch.empty_like(out), torch.empty_like(out, dtype=torch.float64)
    swiglu(gate_up, out)
    reference.swiglu(gate_up, plain)
    reference.swiglu(gate_up.double(), exact)
    assert_near(out, plain, exact)
    assert between.eq(1).all()


def test_large_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-1e30, -200.0, -90.0, 90.0, 200.0, 1e30, 0.0, -0.0, *[2.0] * 8]], device=DEVICE)
    out = torch.empty(1, 8, device=DEVICE)
    swiglu(gate_up, out)
    assert out.tolist() == [[0, 0, pytest.approx(0, abs=1e-36), 180, 400, pytest.approx(2e30), 0, 0]]
