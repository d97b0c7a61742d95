"""The specification itself: what it computes is what transformers computes, and its gradients are autograd's, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qlora_lightning.kernels import reference
from qlora_lightning.kernels.dropout import Dropout, dropped
from qlora_lightning.kernels.heads import HeadNorms, Heads

EPS = 1e-2  # large enough to show where it stands
TOKENS = 7


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norm_is_transformers_norm_with_its_roundings(weight_dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(576, EPS).to(weight_dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x, delta = (torch.randn(TOKENS, 576).bfloat16() for _ in range(2))
    out = torch.empty_like(x)
    expected = x + delta
    total, _ = reference.add_rms_norm(x, delta, norm.weight.float(), EPS, out)
    assert total is delta and total.equal(expected)
    assert out.equal(norm(expected).bfloat16())


def test_norm_backward_is_the_gradient() -> None:
    x, weight = random(TOKENS, 24), torch.rand(24).double()
    dy, past, out = torch.randn_like(x), torch.randn_like(x), torch.empty_like(x)
    expected = F.rms_norm(x, (24,), weight, EPS)
    expected_gradient = past + torch.autograd.grad(expected, x, dy)[0]
    with torch.no_grad():
        stream, rstd = reference.add_rms_norm(x, None, weight, EPS, out)
        reference.rms_norm_backward(dy, stream, rstd, weight, past)
    assert stream is x
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(past, expected_gradient)


def attention_inputs(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, positions: Tensor, norms: HeadNorms | None) -> Tensor:
    """Rotated q and k, and v, as transformers' attention of LLaMA or Qwen3 prepares them."""
    q, k, v = (part.unflatten(1, (-1, heads.size))[None] for part in qkv.split(heads.sizes, 1))
    if norms is not None:
        q, k = F.rms_norm(q, (heads.size,), norms.query_D, norms.eps), F.rms_norm(k, (heads.size,), norms.key_D, norms.eps)
    tables = (torch.cat([table[positions.long()]] * 2, 1)[None] for table in (cos, sin))
    q, k = apply_rotary_pos_emb(q, k, *tables, unsqueeze_dim=2)
    return torch.cat([q, k, v], 2)[0].flatten(1)


@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_its_backward_are_transformers_and_autograds(normed: bool) -> None:
    heads = Heads(4, 2, 20)
    qkv = random(TOKENS, sum(heads.sizes))
    angles = torch.rand(64, heads.size // 2, dtype=torch.float64)
    # With a factor, as some scalings have: the backward may not take the rotation's inverse for its transpose.
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    positions = torch.tensor([0, 1, 2, 0, 63, 1, 5], dtype=torch.int32)
    norms = HeadNorms(torch.rand(20).double(), torch.rand(20).double(), EPS) if normed else None
    out, gradient = torch.empty_like(qkv), torch.empty_like(qkv)
    expected = attention_inputs(qkv, heads, cos, sin, positions, norms)
    dy = torch.randn_like(out)
    dq, dk, dv = (part.unflatten(1, (-1, heads.size)) for part in dy.split(heads.sizes, 1))
    with torch.no_grad():
        reference.rope(qkv, heads, cos, sin, positions, norms, out)
        reference.rope_backward(dq, dk, dv, qkv if normed else None, heads, cos, sin, positions, norms, gradient)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, qkv, dy)[0])


def test_head_norms_round_as_transformers() -> None:
    heads, norm = Heads(4, 2, 64), Qwen3RMSNorm(64, EPS)
    norm.weight.data.uniform_(0.5, 1.5)
    qkv = torch.randn(TOKENS, sum(heads.sizes)).bfloat16()
    out = torch.empty_like(qkv)
    still = torch.ones(1, 32), torch.zeros(1, 32), torch.zeros(TOKENS, dtype=torch.int32)
    reference.rope(qkv, heads, *still, HeadNorms(norm.weight.data, norm.weight.data, EPS), out)
    q_and_k = qkv[:, : 6 * 64].unflatten(1, (6, 64))
    assert out[:, : 6 * 64].equal(norm(q_and_k).bfloat16().flatten(1))
    assert out[:, 6 * 64 :].equal(qkv[:, 6 * 64 :])


@pytest.mark.parametrize("p", [None, 0.25])
def test_down_projs_gradient_goes_through_dropout_and_swiglu(p: float | None) -> None:
    gate_up, a, dxa = random(TOKENS, 48), random(4, 24), torch.randn(TOKENS, 4, dtype=torch.float64)
    dropout = None if p is None else Dropout(p, torch.tensor([12345]), 6)
    hidden = F.silu(gate_up[:, :24]) * gate_up[:, 24:]
    out = torch.empty_like(hidden)
    dhidden = torch.randn_like(hidden)
    with torch.no_grad():
        reference.swiglu(gate_up, out)
    torch.testing.assert_close(out, hidden)
    expected = torch.autograd.grad([hidden, dropped(hidden, dropout, 0) @ a.t()], [gate_up, a], [dhidden, dxa])
    grad_a = torch.ones_like(a)
    cat = torch.cat([dhidden, dxa, torch.full((TOKENS, 60), torch.nan)], 1).detach()
    with torch.no_grad():
        reference.lora_backward_swiglu(cat, gate_up, a, dropout, grad_a)
    torch.testing.assert_close(gate_up.detach(), expected[0])
    torch.testing.assert_close(grad_a.detach() - 1, expected[1])


@pytest.mark.parametrize("input_needed", [True, False])
@pytest.mark.parametrize("p", [None, 0.25])
def test_a_groups_gradient_is_that_of_peft_layers(p: float | None, input_needed: bool) -> None:
    """Two layers behind one norm: y W_j^T + scale * dropout_j(y) A_j^T B_j^T, as one product, and every gradient of it."""
    sizes, rank, scale, width = (20, 12), 4, 0.5, 24
    x, weight, norm_weight = random(TOKENS, width), torch.randn(32, width).double(), torch.rand(width).double()
    a, b = random(2 * rank, width), random(32, rank)
    dropout = None if p is None else Dropout(p, torch.tensor([12345]), 6)
    y = F.rms_norm(x, (width,), norm_weight, EPS)
    pairs = zip(a.split(rank), b.split(sizes), weight.split(sizes), strict=True)
    expected = torch.cat([y @ w.t() + scale * dropped(y, dropout, j) @ a_j.t() @ b_j.t() for j, (a_j, b_j, w) in enumerate(pairs)], 1)
    dy = torch.randn_like(expected)
    wanted_x, wanted_a, wanted_b = torch.autograd.grad(expected, [x, a, b], dy)
    grad_a, grad_b = torch.ones_like(a), torch.ones_like(b)
    with torch.no_grad():
        cat, weights = torch.full((TOKENS, width + 16), torch.nan).double(), torch.full((32, width + 16), torch.nan).double()
        _, rstd = reference.add_rms_norm(x, None, norm_weight, EPS, cat[:, :width])
        reference.lora_project(cat[:, :width], a, rank, dropout, cat[:, width:])
        weights[:, :width] = weight
        reference.place_lora_b(b, sizes, scale, weights[:, width:])
        torch.testing.assert_close(cat @ weights.t(), expected.detach())
        dcat = dy @ weights
        before = dcat.clone()
        reference.lora_backward(dcat, x, a, rank, dropout, grad_a, (rstd, norm_weight), input_needed)
        reference.lora_grad_b(dy, cat[:, width : width + 2 * rank], rank, sizes, scale, grad_b)
        torch.testing.assert_close(grad_a.detach() - 1, wanted_a)
        torch.testing.assert_close(grad_b.detach() - 1, wanted_b)
        if not input_needed:
            assert dcat.equal(before)
            return
        dx = torch.zeros_like(x)
        reference.rms_norm_backward(dcat[:, :width], x, rstd, norm_weight, dx)
        torch.testing.assert_close(dx, wanted_x)


def test_cross_entropy_leaves_its_gradient() -> None:
    logits, targets = random(TOKENS, 11), torch.tensor([3, -100, 0, 10, -100, 5, 5])
    expected = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    left = logits.detach().clone()
    torch.testing.assert_close(reference.cross_entropy(left, targets), expected.detach())
    torch.testing.assert_close(left, gradient)
