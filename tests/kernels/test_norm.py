"""RMSNorm with its residual sum: against the reference, in the dtypes and layouts that blocks use."""

import pytest
import torch
from nearness import DEVICE, apart, assert_near, wide

from qlora_lightning.kernels import norm, reference

# Tokens and width: narrow rows taken several at a time, widths that are no powers of two, one token.
SHAPES = [(7, 24), (33, 576), (5, 1536), (3, 4096), (1, 5120)]
EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_sum_and_norm_equal_the_reference(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta = ((3 * torch.randn(tokens, width, device=DEVICE)).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=DEVICE) + 0.5
    out, between = apart(tokens, width, 64, dtype)
    plain, exact = torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)
    expected = x + delta
    _, exact_rstd = reference.add_rms_norm(*wide(x, delta, weight), EPS, exact)
    _, plain_rstd = reference.add_rms_norm(x, delta.clone(), weight, EPS, plain)
    total, rstd = norm.add_rms_norm(x, delta, weight, EPS, out)
    assert total is delta and total.equal(expected)
    assert_near(rstd, plain_rstd, exact_rstd)
    assert_near(out, plain, exact)
    assert between.eq(1).all()


def test_without_a_delta_the_sum_is_x_itself() -> None:
    torch.manual_seed(0)
    x, _ = apart(9, 576, 8, torch.bfloat16)
    weight = torch.rand(576, device=DEVICE)
    out, plain = torch.empty_like(x), torch.empty_like(x)
    total, rstd = norm.add_rms_norm(x, None, weight, EPS, out)
    _, plain_rstd = reference.add_rms_norm(x, None, weight, EPS, plain)
    assert total is x
    torch.testing.assert_close(rstd, plain_rstd)
    torch.testing.assert_close(out, plain)


def test_the_norm_rounds_before_the_weight() -> None:
    """As transformers does: one rounding at the end would give other values."""
    torch.manual_seed(0)
    x = torch.randn(64, 256, device=DEVICE).bfloat16()
    weight = torch.full((256,), 1.37, device=DEVICE)
    out = torch.empty_like(x)
    _, rstd = norm.add_rms_norm(x, None, weight, EPS, out)
    normalised = x.float() * rstd[:, None]
    assert out.equal((normalised.bfloat16() * weight).bfloat16())
    assert not out.equal((normalised * weight).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_backward_adds_to_the_gradient_past_the_norm(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dy, between = apart(tokens, width, 128, dtype)
    x, past = (torch.randn(tokens, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=DEVICE) + 0.5
    rstd = (x.float().square().mean(1) + EPS).rsqrt()
    fused, plain, exact = past.clone(), past.clone(), past.double()
    norm.rms_norm_backward(dy, x, rstd, weight, fused)
    reference.rms_norm_backward(dy, x, rstd, weight, plain)
    reference.rms_norm_backward(*wide(dy, x, rstd, weight), exact)
    assert_near(fused, plain, exact)
    assert between.eq(1).all()
