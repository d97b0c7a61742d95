"""Attention by hand: the reference against torch's SDPA with explicit masks, the GPU's backends against the reference."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from qlora_lightning.kernels import attention
from qlora_lightning.kernels.attention import Backend, Layout, attend, attend_backward, choose_backend, describe
from qlora_lightning.kernels.heads import Heads

BORDERS = [0, 5, 6, 17, 24, 24, 24]
DENSE, PACKED = Layout(3, 8), Layout(1, 24, torch.tensor(BORDERS, dtype=torch.int32), 11)
HEADS = {"multi-head": Heads(3, 3, 4), "grouped": Heads(6, 2, 4)}
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def mask_of(layout: Layout, window: int | None) -> Tensor:
    """[N, N] bool: what transformers' own rule lets a token see, of its sequence."""
    tokens = layout.rows * layout.length
    borders = range(0, tokens + 1, layout.length) if layout.cu_seqlens is None else layout.cu_seqlens.tolist()
    positions, zero = torch.arange(tokens), torch.tensor(0)
    sees = sliding_window_causal_mask_function(window or tokens)(zero, zero, positions[:, None], positions)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for begin, end in pairwise(borders):
        mask[begin:end, begin:end] = sees[begin:end, begin:end]
    return mask


def by_sdpa(qkv: Tensor, heads: Heads, mask: Tensor, scale: float) -> Tensor:
    """[N, H * D] by torch's attention under an explicit mask."""
    q, k, v = (part.unflatten(1, (-1, heads.size)).transpose(0, 1)[None] for part in qkv.split(heads.sizes, 1))
    k, v = (part.repeat_interleave(heads.query // heads.key, 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1).flatten(1)


def in_wider_rows(tensor: Tensor) -> Tensor:
    """The same values, rows further apart."""
    return torch.cat([tensor, torch.full_like(tensor[:, :8], torch.nan)], 1)[:, : tensor.shape[1]]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("layout", [DENSE, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_equals_sdpa_under_an_explicit_mask(heads: Heads, layout: Layout, window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(24, sum(heads.sizes), dtype=dtype)
    dout = torch.randn(24, heads.query * heads.size, dtype=dtype)
    exact = qkv.to(torch.float64, copy=True).requires_grad_()
    expected = by_sdpa(exact, heads, mask_of(layout, window), 0.3)
    (gradient,) = torch.autograd.grad(expected, exact, dout.double())

    qkv, dout = in_wider_rows(qkv), in_wider_rows(dout)
    attended = attend(qkv, heads, layout, window, 0.3, "reference")
    gradients = attend_backward(dout, qkv, attended, heads, layout, window, 0.3, "reference")

    assert attended.out.dtype == dtype and all(part.stride(-1) == 1 for part in gradients)
    bounds = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}
    for got, wanted in [(attended.out, expected), (torch.cat([part.flatten(1) for part in gradients], 1), gradient)]:
        assert (got.double() - wanted).norm() <= bounds[dtype] * wanted.norm()


def test_padding_at_the_end_of_a_row_reaches_nothing() -> None:
    heads, padded = Heads(2, 1, 8), Layout(2, 6)
    qkv = torch.randn(12, sum(heads.sizes))
    changed = qkv.clone()
    changed[10:] = torch.randn(2, sum(heads.sizes))  # the second row's last two
    first, second = (attend(part, heads, padded, None, 0.3, "reference").out for part in (qkv, changed))
    assert torch.equal(first[:10], second[:10])


def choose_on(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    fa4: bool,
    layout: Layout,
    size: int,
    window: int | None,
    reproducible: bool,
) -> Backend:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "fa4_installed", lambda: fa4)
    return choose_backend(CUDA, layout, Heads(4, 4, size), window, reproducible)


@pytest.mark.parametrize(
    ("capability", "fa4", "layout", "size", "window", "reproducible", "expected"),
    [
        ((9, 0), False, DENSE, 128, None, True, "flash"),
        ((9, 0), False, DENSE, 128, None, False, "cudnn"),
        ((9, 0), False, DENSE, 128, 8, False, "cudnn"),  # a window that no row reaches
        ((9, 0), False, DENSE, 128, 7, False, "flash"),
        ((9, 0), False, DENSE, 256, None, False, "flash"),
        ((9, 0), True, DENSE, 128, None, True, "fa4"),
        ((9, 0), True, PACKED, 128, 7, True, "fa4"),
        ((9, 0), False, PACKED, 128, None, False, "varlen"),
        ((8, 9), True, PACKED, 128, None, True, "varlen"),
        ((8, 0), False, DENSE, 64, None, False, "flash"),
        ((8, 0), False, DENSE, 100, None, True, "reference"),
        ((7, 5), False, DENSE, 64, None, True, "reference"),
    ],
)
def test_backend_is_the_fastest_that_can(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    fa4: bool,
    layout: Layout,
    size: int,
    window: int | None,
    reproducible: bool,
    expected: Backend,
) -> None:
    assert choose_on(monkeypatch, capability, fa4, layout, size, window, reproducible) == expected


def test_a_cpu_takes_the_reference_and_says_so() -> None:
    assert choose_backend(CPU, DENSE, HEADS["grouped"], None) == "reference"
    assert "plain torch" in describe("reference")


def test_the_switch_for_equal_bits_is_put_back() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(ZeroDivisionError), attention._fixed_order():
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
        _ = 1 / 0
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


# ---- on a GPU, by hand ----

LONG_BORDERS = [0, 300, 301, 700, 960, 1024, 1024, 1024]
LONG_DENSE = Layout(2, 512)
CASES: list[tuple[Backend, bool, int | None]] = [
    ("cudnn", False, None),
    ("flash", False, None),
    ("flash", False, 100),
    ("varlen", True, None),
    ("varlen", True, 100),
    ("fa4", True, None),
    ("fa4", True, 100),
    ("fa4", False, None),
]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]


def gpu(function: Callable[..., None]) -> Callable[..., None]:
    """Over backends and kinds of heads, on a GPU."""
    for mark in on_gpu:
        function = mark(function)
    function = pytest.mark.parametrize(("backend", "packed", "window"), CASES)(function)
    return pytest.mark.parametrize("heads", [Heads(8, 8, 128), Heads(8, 2, 128), Heads(6, 2, 64)], ids=str)(function)


def gpu_case(backend: Backend, packed: bool, heads: Heads) -> tuple[Layout, Tensor, Tensor]:
    if backend == "fa4" and not attention.fa4_installed():
        pytest.skip("needs flash-attn-4, which is not installed")
    torch.manual_seed(0)
    layout = Layout(1, 1024, torch.tensor(LONG_BORDERS, dtype=torch.int32, device="cuda"), 399) if packed else LONG_DENSE
    qkv = torch.randn(1024, sum(heads.sizes), device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(1024, heads.query * heads.size, device="cuda", dtype=torch.bfloat16)
    return layout, in_wider_rows(qkv), in_wider_rows(dout)


def both_ways(
    qkv: Tensor, dout: Tensor, heads: Heads, layout: Layout, window: int | None, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = heads.size**-0.5
    attended = attend(qkv, heads, layout, window, scale, backend)
    return attended.out, *attend_backward(dout, qkv, attended, heads, layout, window, scale, backend)


def in_plain_torch(qkv: Tensor, dout: Tensor, heads: Heads, mask: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradient of q, k and v, every operation in qkv's dtype."""
    leaf = qkv.detach().clone().requires_grad_()
    q, k, v = (part.unflatten(1, (-1, heads.size)).transpose(0, 1) for part in leaf.split(heads.sizes, 1))
    k, v = (part.repeat_interleave(heads.query // heads.key, 0) for part in (k, v))
    scores = (q @ k.transpose(1, 2) * heads.size**-0.5).masked_fill(~mask, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out.detach(), *torch.autograd.grad(out, leaf, dout)[0].split(heads.sizes, 1)


@gpu
def test_backend_equals_the_reference(backend: Backend, packed: bool, window: int | None, heads: Heads) -> None:
    layout, qkv, dout = gpu_case(backend, packed, heads)
    exact = both_ways(qkv.double(), dout.double(), heads, layout, window, "reference")
    plain = in_plain_torch(qkv, dout, heads, mask_of(layout, window).cuda())
    for got, rounded, wanted in zip(both_ways(qkv, dout, heads, layout, window, backend), plain, exact, strict=True):
        assert got.stride(-1) == 1
        assert (got.flatten(1) - wanted.flatten(1)).norm() <= 2 * (rounded - wanted.flatten(1)).norm()


@gpu
def test_two_backwards_are_equal_bit_for_bit(backend: Backend, packed: bool, window: int | None, heads: Heads) -> None:
    if backend == "cudnn":
        pytest.skip("not promised of cuDNN")
    layout, qkv, dout = gpu_case(backend, packed, heads)
    first = both_ways(qkv, dout, heads, layout, window, backend)
    for _ in range(5):
        assert all(map(torch.equal, first, both_ways(qkv, dout, heads, layout, window, backend)))


@gpu
def test_a_captured_graph_takes_new_values_and_borders(backend: Backend, packed: bool, window: int | None, heads: Heads) -> None:
    layout, qkv, dout = gpu_case(backend, packed, heads)
    layout = replace(layout, longest=512)
    both_ways(qkv, dout, heads, layout, window, backend)  # compiled and planned outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(qkv, dout, heads, layout, window, backend)
    qkv.normal_()
    if layout.cu_seqlens is not None:
        layout.cu_seqlens.copy_(torch.tensor([0, 10, 500, 1012, 1020, 1021, 1022, 1024]))
    graph.replay()
    expected = both_ways(qkv, dout, heads, layout, window, backend)
    for got, wanted in zip(captured, expected, strict=True):
        if backend == "cudnn":
            torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(got, wanted)
