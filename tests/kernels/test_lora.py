"""LoRA's kernels against the reference, and the reference against autograd of what PEFT computes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nearness import DEVICE, apart, assert_near
from torch import Tensor
from torch.nn import functional as F

from qlora_lightning.kernels import reference
from qlora_lightning.kernels.dropout import Dropout, keep_mask
from qlora_lightning.kernels.lora_backward import lora_backward, lora_backward_swiglu, lora_grad_b
from qlora_lightning.kernels.lora_project import lora_project
from qlora_lightning.kernels.tiling import layer_groups, splits

PADDING = 64
SHAPES = [(37, 576, 3, 8), (150, 256, 2, 16), (33, 192, 1, 64), (70, 128, 3, 64), (65, 128, 3, 128), (5, 64, 1, 24)]
"""Tokens, features, layers, rank: more and fewer than a tile holds."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[None, 0.1], ids=["all", "dropout"])
def dropout(request: pytest.FixtureRequest) -> Dropout | None:
    return None if request.param is None else Dropout(request.param, torch.tensor([2**40 + 5], device=DEVICE), 6)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def results(kernel: Callable[..., None], plain: Callable[..., None], written: list[Tensor], *inputs: Any) -> Iterator[list[Tensor]]:
    """What a kernel, the reference and the reference in float64 make of copies of the tensors that are ``written`` (given first)."""

    def exact(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(exact(entry) for entry in value)
        return value.double() if isinstance(value, Tensor) else value

    for function, convert in ((kernel, lambda value: value), (plain, lambda value: value), (plain, exact)):
        copies = [convert(tensor).clone() for tensor in written]
        function(copies, *(convert(value) for value in inputs))
        yield copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "features", "layers", "rank"), SHAPES)
def test_project(tokens: int, features: int, layers: int, rank: int, dtype: torch.dtype, dropout: Dropout | None) -> None:
    if DEVICE == "cuda" and dtype == torch.float32 and dropout is not None:
        with pytest.raises(AssertionError, match="TF32"):
            lora_project(normal(1, 64, dtype=dtype), normal(8, 64, dtype=dtype), 8, dropout, normal(1, 64, dtype=dtype))
        return
    a = normal(layers * rank, features, dtype=dtype)
    columns = -(-layers * rank // PADDING) * PADDING
    x, between = apart(tokens, features, columns, dtype)
    copied, _ = apart(tokens, features, columns, dtype)
    plain = torch.full_like(between, 9)
    exact = plain.double()
    lora_project(x, a, rank, dropout, between, copied)
    reference.lora_project(x, a, rank, dropout, plain)
    reference.lora_project(x.double(), a.double(), rank, dropout, exact)
    assert_near(between, plain, exact)
    assert between[:, layers * rank :].eq(0).all()
    assert copied.equal(x)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("input_needed", [False, True])
@pytest.mark.parametrize(("tokens", "features", "layers", "rank"), SHAPES)
def test_backward(tokens: int, features: int, layers: int, rank: int, normed: bool, input_needed: bool, dropout: Dropout | None) -> None:
    a = normal(layers * rank, features)
    dcat = normal(tokens, features + layers * rank + PADDING)
    grad = normal(layers * rank, features, dtype=torch.float32)
    x = normal(tokens, features)
    norm = (torch.rand(tokens, device=DEVICE) + 0.5, torch.rand(features, device=DEVICE) + 0.5) if normed else None

    def backward(function: Callable[..., None]) -> Callable[..., None]:
        return lambda written, x, a, norm: function(written[0], x, a, rank, dropout, written[1], norm, input_needed)

    fused, plain, exact = results(backward(lora_backward), backward(reference.lora_backward), [dcat, grad], x, a, norm)
    for triple in zip(fused, plain, exact, strict=True):
        assert_near(*triple)
    assert fused[0][:, features:].equal(dcat[:, features:])
    assert input_needed or fused[0].equal(dcat)


@pytest.mark.parametrize(("tokens", "features", "rank"), [(33, 192, 64), (100, 576, 8)])
def test_backward_swiglu(tokens: int, features: int, rank: int, dropout: Dropout | None) -> None:
    a, dcat, gate_up = normal(rank, features), normal(tokens, features + PADDING), normal(tokens, 2 * features)
    grad = torch.zeros(rank, features, device=DEVICE)

    def backward(function: Callable[..., None]) -> Callable[..., None]:
        return lambda written, dcat, a: function(dcat.clone(), written[0], a, dropout, written[1])

    fused, plain, exact = results(backward(lora_backward_swiglu), backward(reference.lora_backward_swiglu), [gate_up, grad], dcat, a)
    for triple in zip(fused, plain, exact, strict=True):
        assert_near(*triple)


def test_large_gates_have_finite_gradients() -> None:
    gate_up = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, 1.0] + [1.0] * 8], device=DEVICE).bfloat16()
    dcat, a, grad = normal(1, 8 + PADDING), normal(8, 8), torch.zeros(8, 8, device=DEVICE)
    lora_backward_swiglu(dcat, gate_up, a, None, grad)
    assert gate_up.isfinite().all() and grad.isfinite().all()


def test_grad_b() -> None:
    sizes = (48, 16, 16)
    dy, (xa, _), grad = normal(37, 80), apart(37, 24, 40, torch.bfloat16), normal(80, 8, dtype=torch.float32)

    def grad_b(function: Callable[..., None]) -> Callable[..., None]:
        return lambda written, dy, xa: function(dy, xa, 8, sizes, 0.25, written[0])

    for triple in zip(*results(grad_b(lora_grad_b), grad_b(reference.lora_grad_b), [grad], dy, xa), strict=True):
        assert_near(*triple)


def test_results_are_the_same_every_time(dropout: Dropout | None) -> None:
    a, x, dcat = normal(48, 256), normal(300, 256), normal(300, 256 + PADDING)

    def once() -> list[Tensor]:
        out, dx, grad = normal(300, PADDING), dcat.clone(), torch.zeros(48, 256, device=DEVICE)
        lora_project(x, a, 16, dropout, out)
        lora_backward(dx, x, a, 16, dropout, grad)
        return [out, dx, grad]

    assert all(first.equal(second) for first, second in zip(once(), once(), strict=True))


def test_the_sum_is_shared_where_programs_are_few() -> None:
    device = torch.device("cpu")
    assert splits(1, 64, 1, device) == 8
    assert splits(8, 64, 1, device) == 1
    assert splits(1, 1, 1, device) == 1
    assert list(layer_groups(3, 64, 192)) == [(0, 3)]
    assert list(layer_groups(3, 128, 256)) == [(0, 1), (1, 1), (2, 1)]


def test_the_reference_is_the_gradient_of_pefts_layers() -> None:
    """x W^T + scale * dropout_j(x) A_j^T B_j^T of three layers with masks of their own, by autograd in float64."""
    tokens, features, rank, scale, sizes = 9, 128, 8, 0.5, (64, 32, 32)
    dropout = Dropout(0.3, torch.tensor([11]), 2)
    x = torch.randn(tokens, features, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(size, features, dtype=torch.float64) for size in sizes]
    a = [torch.randn(rank, features, dtype=torch.float64, requires_grad=True) for _ in sizes]
    b = [torch.randn(size, rank, dtype=torch.float64, requires_grad=True) for size in sizes]
    masks = [keep_mask(dropout, number, tokens, features) / (1 - dropout.threshold / 65536) for number in range(3)]
    y = torch.cat(
        [F.linear(x, w) + scale * F.linear(F.linear(x * m, a_j), b_j) for w, m, a_j, b_j in zip(weights, masks, a, b, strict=True)], 1
    )
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *a, *b], dy)

    with torch.no_grad():
        stacked_a, stacked_b = torch.cat(a), torch.cat(b)
        cat, wide = torch.zeros(tokens, features + PADDING).double(), torch.zeros(sum(sizes), features + PADDING).double()
        cat[:, :features], wide[:, :features] = x, torch.cat(weights)
        reference.lora_project(cat[:, :features], stacked_a, rank, dropout, cat[:, features:])
        reference.place_lora_b(stacked_b, sizes, scale, wide[:, features:])
        torch.testing.assert_close(cat @ wide.t(), y)
        dcat, grad_a, grad_b = dy @ wide, torch.zeros_like(stacked_a), torch.zeros_like(stacked_b)
        reference.lora_backward(dcat, x, stacked_a, rank, dropout, grad_a)
        reference.lora_grad_b(dy, cat[:, features:], rank, sizes, scale, grad_b)
    for actual, gradient in zip([dcat[:, :features], *grad_a.split(rank), *grad_b.split(sizes)], expected, strict=True):
        torch.testing.assert_close(actual, gradient)
