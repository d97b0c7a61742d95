"""Causal attention forward and backward by hand on a stacked q, k, v, by the fastest means at hand.

What is fastest depends on the device and on how the tokens lie (milliseconds of forward + backward of a 7B layer of 8,192 tokens on an
H200, head size 128, rows of 2,048 and of 512 tokens: benchmarks/2026-11-23-kernels-h200.md):

========  ============================================  ===========  ===========
backend   what it is                                    rows 2,048   rows 512
========  ============================================  ===========  ===========
fa4       FlashAttention 4 (extra package), any rows    0.35 + 0.90  0.23 + 0.52
cudnn     cuDNN's fused attention, dense rows           0.31 + 0.90  0.15 + 0.46
flash     torch's FlashAttention 2, dense rows          0.53 + 1.56  0.23 + 0.62
varlen    the same on packed rows                       0.55 + 1.59  0.28 + 0.63
========  ============================================  ===========  ===========

Both FlashAttentions can sum dq in a fixed order, and do here: their backward repeats to the bit. cuDNN's adds tiles of dq as they come, and
torch has no switch for its ordered variant; so it is taken only where equal bits are not asked for.

Shapes: N tokens, H query heads, G key/value heads, D their size; B rows of S tokens where they are not packed.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qlora_lightning.kernels.heads import Heads

Backend = Literal["cudnn", "flash", "varlen", "fa4", "reference"]

_DESCRIPTIONS: dict[Backend, str] = {
    "cudnn": "cuDNN on dense rows (the last bits of gradients differ between runs)",
    "flash": "torch's FlashAttention 2 on dense rows",
    "varlen": "torch's FlashAttention 2 on packed rows",
    "fa4": "FlashAttention 4, on dense or packed rows",
    "reference": "plain torch (slow, and memory grows with the square of the length)",
}


@dataclass(frozen=True)
class Layout:
    """How N tokens lie: rows of one length, padded at their ends (what follows a token never reaches it), or packed sequences."""

    rows: int
    length: int
    """N = rows * length."""
    cu_seqlens: Tensor | None = None
    """[segments + 1] int32 on the device where sequences are packed: their borders over all N tokens. Empty segments may stand at the
    end, so that the number of segments can stay the same from step to step."""
    longest: int = 0
    """No packed segment is longer; known on the host."""

    @property
    def bound(self) -> int:
        """No sequence is longer."""
        return self.length if self.cu_seqlens is None else self.longest


class Attended(NamedTuple):
    """What attention gives, and what its backward needs of it beside its input."""

    out: Tensor
    """[N, H * D]."""
    lse: Tensor | None = None
    """Logarithms of the softmax's denominators, in the backend's own shape."""
    random: tuple[Tensor | None, Tensor | None] = (None, None)
    """State of a dropout that is not used, which the backends want back all the same."""


def choose_backend(device: torch.device, layout: Layout, heads: Heads, window: int | None, reproducible: bool = True) -> Backend:
    """The fastest backend that can do it.

    Args:
        device: of the tokens.
        layout: only its shape matters here.
        heads: H, G, D.
        window: keys that a query sees, itself included; None is all before it.
        reproducible: two runs must be equal bit for bit, as a resumed run is to the one that was interrupted.
    """
    if device.type != "cuda" or heads.size % 8 or heads.size > 256:
        return "reference"
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        return "reference"
    dense, small = layout.cu_seqlens is None, heads.size <= 128
    if small and major in (9, 10) and fa4_installed():
        return "fa4"
    # cuDNN is ahead of FlashAttention 2 on Hopper and on the Blackwell of servers; torch's call knows no window and no single token.
    if dense and not reproducible and small and major in (9, 10) and layout.length > 1 and _window(window, layout) is None:
        return "cudnn"
    return "flash" if dense else "varlen"


def describe(backend: Backend) -> str:
    """A few words for the log."""
    return _DESCRIPTIONS[backend]


@cache
def fa4_installed() -> bool:
    """Whether FlashAttention 4 (package ``flash-attn-4``) can be imported; it is not imported here, which takes seconds."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None and importlib.util.find_spec("cutlass") is not None


def attend(qkv: Tensor, heads: Heads, layout: Layout, window: int | None, scale: float, backend: Backend) -> Attended:
    """softmax(scale * q k^T) v, each token seeing those of its sequence up to itself.

    Args:
        qkv: [N, (H + 2 G) D], after RoPE; rows may be further apart. No part of it is copied.
        heads: H, G, D.
        layout: how the tokens lie.
        window: as in ``choose_backend``; one that no sequence reaches is none.
        scale: of the scores.
        backend: as chosen for this device and layout.
    """
    q, k, v = _split(qkv, heads, layout)
    window = _window(window, layout)
    match backend:
        case "cudnn":
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
                q, k, v, None, True, 0.0, True, False, scale=scale
            )
            return Attended(_joined(out.transpose(1, 2)), lse, (seed, offset))
        case "flash" | "varlen":
            borders, longest = layout.cu_seqlens, layout.bound
            out, lse, *random, _ = torch.ops.aten._flash_attention_forward.default(
                q, k, v, borders, borders, longest, longest, 0.0, True, False, scale=scale, **_torch_window(window)
            )
            return Attended(_joined(out), lse, (random[0], random[1]))
        case "fa4":
            out, lse, *_ = _fa4()._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **_fa4_options(layout, window))
            return Attended(_joined(out), lse)
        case "reference":
            return Attended(_joined(_reference(q, k, v, layout, window, scale)))


def attend_backward(
    dout: Tensor,
    qkv: Tensor,
    attended: Attended,
    heads: Heads,
    layout: Layout,
    window: int | None,
    scale: float,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [N, H, D], k [N, G, D] and v [N, G, D]: any strides, the last dimension contiguous.

    Args:
        dout: [N, H * D], the gradient of ``attended.out``; rows may be further apart.
        qkv: as given to ``attend``, and so are the arguments after the next.
        attended: what ``attend`` gave.
        heads: H, G, D.
        layout: how the tokens lie.
        window: as in ``choose_backend``.
        scale: of the scores.
        backend: that of the forward.
    """
    q, k, v = _split(qkv, heads, layout)
    window = _window(window, layout)
    dout, out = (_rows(part.unflatten(1, (heads.query, heads.size)), layout) for part in (dout, attended.out))
    match backend:
        case "cudnn":
            turned = [part.transpose(1, 2) for part in (dout, q, k, v, out)]
            random = attended.random
            gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
                *turned, attended.lse, *random, None, None, None, layout.length, layout.length, 0.0, True, scale=scale
            )
            gradients = [gradient.transpose(1, 2) for gradient in gradients]
        case "flash" | "varlen":
            borders, longest, random = layout.cu_seqlens, layout.bound, attended.random
            with _fixed_order():
                gradients = torch.ops.aten._flash_attention_backward.default(
                    dout,
                    q,
                    k,
                    v,
                    out,
                    attended.lse,
                    borders,
                    borders,
                    longest,
                    longest,
                    0.0,
                    True,
                    *random,
                    scale=scale,
                    **_torch_window(window),
                )
        case "fa4":
            gradients = _fa4()._flash_attn_bwd(
                q, k, v, out, dout, attended.lse, softmax_scale=scale, deterministic=True, **_fa4_options(layout, window)
            )
        case "reference":
            with torch.enable_grad():
                q, k, v = leaves = [part.detach().requires_grad_() for part in (q, k, v)]
                again = _reference(q, k, v, layout, window, scale)
            gradients = [gradient.contiguous() for gradient in torch.autograd.grad(again, leaves, dout)]
    dq, dk, dv = (gradient.reshape(-1, *gradient.shape[-2:]) for gradient in gradients)
    return dq, dk, dv


def _split(qkv: Tensor, heads: Heads, layout: Layout) -> list[Tensor]:
    """Views of q, k, v: [B, S, heads, D], or [N, heads, D] where rows are packed."""
    return [_rows(part.unflatten(1, (-1, heads.size)), layout) for part in qkv.split(heads.sizes, 1)]


def _rows(part: Tensor, layout: Layout) -> Tensor:
    return part if layout.cu_seqlens is not None else part.unflatten(0, (layout.rows, layout.length))


def _joined(out: Tensor) -> Tensor:
    """[N, H * D] of [B, S, H, D] or [N, H, D], without a copy."""
    return out.view(-1, out.shape[-2] * out.shape[-1])


def _window(window: int | None, layout: Layout) -> int | None:
    """None where no sequence is longer than the window."""
    return None if window is None or window >= layout.bound else window


def _torch_window(window: int | None) -> dict[str, int]:
    """A window counts the query's own token, the kernels only those before it."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


@contextmanager
def _fixed_order() -> Iterator[None]:
    """Have FlashAttention 2 sum dq in a fixed order; it reads torch's global switch, whose other effects are not wanted here."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # it would write NaN over every buffer first
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(filling)


@cache
def _fa4() -> Any:
    """FlashAttention 4's interface: its forward and backward by themselves, which its autograd functions call."""
    return importlib.import_module("flash_attn.cute.interface")


def _fa4_options(layout: Layout, window: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": True}
    if window is not None:
        options |= {"window_size_left": window - 1, "window_size_right": 0}
    if layout.cu_seqlens is not None:
        options |= {f"cu_seqlens_{part}": layout.cu_seqlens for part in "qk"} | {f"max_seqlen_{part}": layout.longest for part in "qk"}
    return options


def _reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float) -> Tensor:
    """[B, S, H, D] or [N, H, D]: all scores at once, sums in fp32 (fp64 of fp64 inputs)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_HSD, k_HSD, v_HSD = (part.transpose(-2, -3).to(wide) for part in (q, k, v))
    groups = q.shape[-2] // k.shape[-2]
    k_HSD, v_HSD = (part.repeat_interleave(groups, -3) for part in (k_HSD, v_HSD))
    scores = (q_HSD @ k_HSD.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~_visible(q.shape[-3], layout, window, q.device), float("-inf"))
    return (scores.softmax(-1) @ v_HSD).transpose(-2, -3).to(q.dtype).contiguous()


def _visible(tokens: int, layout: Layout, window: int | None, device: torch.device) -> Tensor:
    """[tokens, tokens] bool: which key (column) a query (row) sees."""
    positions = torch.arange(tokens, device=device)
    distance = positions[:, None] - positions
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if layout.cu_seqlens is not None:
        segments = torch.searchsorted(layout.cu_seqlens.long(), positions, right=True)
        visible &= segments[:, None] == segments
    return visible
