"""RoPE with and without the norms of single heads, forward and backward, against the reference."""

import pytest
import torch
from nearness import DEVICE, assert_near, wide
from torch import Tensor

from qlora_lightning.kernels import reference, rope
from qlora_lightning.kernels.heads import HeadNorms, Heads

# LLaMA's, grouped queries, SmolLM2's three groups, sizes that are no powers of two, and more heads than a tile holds.
HEADS = [Heads(4, 4, 128), Heads(8, 2, 64), Heads(9, 3, 64), Heads(6, 2, 80), Heads(5, 1, 96), Heads(40, 40, 128)]
TOKENS = 5


def tables(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [64, D / 2], and positions as packing gives them: every row begins at zero."""
    angles = torch.arange(64)[:, None] / 10000 ** (torch.arange(size // 2) / (size // 2))
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE), torch.tensor([0, 1, 0, 63, 17], dtype=torch.int32, device=DEVICE)


def norms_of(size: int, normed: bool) -> tuple[HeadNorms | None, HeadNorms | None]:
    """Norms of heads, and the same in float64."""
    if not normed:
        return None, None
    query, key = (torch.rand(size, device=DEVICE) + 0.5 for _ in range(2))
    return HeadNorms(query, key, 1e-6), HeadNorms(query.double(), key.double(), 1e-6)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rope_equals_the_reference(heads: Heads, dtype: torch.dtype, normed: bool) -> None:
    torch.manual_seed(0)
    cos, sin, positions = tables(heads.size)
    norms, wide_norms = norms_of(heads.size, normed)
    qkv = torch.randn(TOKENS, sum(heads.sizes), device=DEVICE).to(dtype)
    fused, plain, exact = torch.empty_like(qkv), torch.empty_like(qkv), torch.empty_like(qkv, dtype=torch.float64)
    rope.rope(qkv, heads, cos, sin, positions, norms, fused)
    reference.rope(qkv, heads, cos, sin, positions, norms, plain)
    reference.rope(qkv.double(), heads, cos.double(), sin.double(), positions, wide_norms, exact)
    assert_near(fused, plain, exact)
    assert fused[:, -heads.sizes[2] :].equal(qkv[:, -heads.sizes[2] :])
    rope.rope(qkv, heads, cos, sin, positions, norms, qkv)
    assert qkv.equal(fused)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_backward_equals_the_reference(heads: Heads, dtype: torch.dtype, normed: bool) -> None:
    torch.manual_seed(0)
    cos, sin, positions = tables(heads.size)
    norms, wide_norms = norms_of(heads.size, normed)
    qkv = torch.randn(TOKENS, sum(heads.sizes), device=DEVICE).to(dtype) if normed else None
    dq = torch.randn(heads.query, TOKENS, heads.size, device=DEVICE).to(dtype).transpose(0, 1)  # heads further apart than tokens
    dk = torch.randn(TOKENS, 2 * heads.key, heads.size, device=DEVICE).to(dtype)[:, heads.key :]  # part of a wider buffer
    dv = torch.randn(TOKENS, heads.key, heads.size, device=DEVICE).to(dtype)
    fused, plain, exact = (torch.empty(TOKENS, sum(heads.sizes), dtype=kind, device=DEVICE) for kind in (dtype, dtype, torch.float64))
    rope.rope_backward(dq, dk, dv, qkv, heads, cos, sin, positions, norms, fused)
    reference.rope_backward(dq, dk, dv, qkv, heads, cos, sin, positions, norms, plain)
    reference.rope_backward(*wide(dq, dk, dv, qkv), heads, cos.double(), sin.double(), positions, wide_norms, exact)
    assert_near(fused, plain, exact)
