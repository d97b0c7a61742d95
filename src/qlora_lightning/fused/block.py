"""One decoder block, forward and backward by hand.

    x -> RMSNorm -> q, k, v -> RoPE -> attention -> o -> + x = x2 -> RMSNorm -> gate, up -> SwiGLU -> down -> + x2

A block hands on ``x2`` and down_proj's output apart: the next norm adds them in the pass that it makes anyway. No gradient of a frozen
weight is ever computed. Shapes: N tokens, d hidden, f intermediate size; ``cat`` as in ``kernels/reference.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from qlora_lightning.fused.linear import Linear, LinearGroup
from qlora_lightning.fused.rungs import BlockShape, Rung
from qlora_lightning.kernels.attention import Attended, Backend, Layout, attend, attend_backward
from qlora_lightning.kernels.heads import HeadNorms, Heads

MLP_TILE = 2048
"""Tokens of which gate and up are held at once where a block does not keep them, 86 MiB at 7B. Products of so many rows are as fast as of
all (benchmarks/2026-11-23-fused-7b-h200.md)."""


@dataclass(frozen=True)
class Pass:
    """What the blocks share in one forward and backward."""

    kernels: ModuleType
    layout: Layout
    backend: Backend
    cos: Tensor
    """[positions, D / 2] fp32."""
    sin: Tensor
    positions: Tensor
    """[N] int32."""
    seed: Tensor
    """[1] int64, of the dropout."""
    dtype: torch.dtype
    linear: type[Linear] = Linear
    """How products with frozen weights are computed."""
    expanded: Mapping[int, Tensor] = field(default_factory=dict)
    """Weights that are kept in ``dtype``, by their group's ``stream``."""

    def at_work(self, group: LinearGroup) -> Linear:
        """A group with its weights in the dtype of the products."""
        kept = self.expanded.get(group.stream)
        if kept is not None:
            return Linear(group, self.kernels, self.seed, self.dtype, kept)
        return self.linear(group, self.kernels, self.seed, self.dtype)


@dataclass(frozen=True)
class GateUp:
    """What gate and up make of a tile of n tokens."""

    out: Tensor
    """[n, 2 f]: gate's output and, behind it, up's."""
    xa: Tensor
    """[n, 2 r]: LoRA's first product."""
    rstd: Tensor
    """[n]: 1 / root mean square of the norm before them."""


@dataclass
class Tile:
    """What a block keeps of its second half for a tile of tokens."""

    xa_down: Tensor
    """[n, r]: LoRA's first product of down_proj, always kept: so that its product need not be computed again."""
    made: GateUp | None


@dataclass
class Kept:
    """What a block keeps between forward and backward; None is computed again."""

    x: Tensor
    """[N, d]: the block's input."""
    rstd1: Tensor | None
    xa_qkv: Tensor | None
    qkv: Tensor | None
    """[N, (H + 2 G) D] after RoPE."""
    qkv_before: Tensor | None
    """The same before the heads' norms, where there are any."""
    attended: Attended | None = None
    xa_out: Tensor | None = None
    """[N, r]: LoRA's first product of o_proj."""
    x2: Tensor | None = None
    """[N, d]: what the second half reads."""
    tiles: list[Tile] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """The weights of a decoder block."""

    qkv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norm1: Tensor
    """[d] fp32: input_layernorm."""
    norm2: Tensor
    """[d] fp32: post_attention_layernorm."""
    eps: float
    heads: Heads
    head_norms: HeadNorms | None
    window: int | None
    """Tokens that a query sees, itself included; None is all before it."""
    scale: float
    """Of attention's scores."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """All its linear layers."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def parameters(self) -> int:
        """Frozen weights of its linear layers."""
        return sum(group.outputs * group.features for group in self.groups)

    @property
    def shape(self) -> BlockShape:
        """Its sizes."""
        query, key, value = self.heads.sizes
        return BlockShape(
            self.qkv.features, self.down.features, query, key + value, self.heads.query, self.qkv.rank, self.head_norms is not None
        )

    # ---- forward ----

    def forward(self, x: Tensor, delta: Tensor | None, run: Pass, rung: Rung) -> tuple[Tensor, Tensor, Kept]:
        """The block's two results and what it keeps.

        Args:
            x: [N, d]: the residual stream.
            delta: [N, d]: to be added to it first, or None.
            run: what the blocks share.
            rung: what to keep.

        Returns:
            x2 and down_proj's output, whose sum is the block's, and what backward needs.
        """
        kept = self._query_key_value(x, delta, run)
        kept.attended = self._attend(kept, run)
        attention_out = self._project_out(kept, run)
        if rung > Rung.NO_MLP:
            kept.rstd1 = kept.xa_qkv = kept.qkv = kept.qkv_before = None
        if rung > Rung.ATTENTION:
            kept.attended = kept.xa_out = None
        x2, down = self._mlp(kept, attention_out, run, keep=rung == Rung.ALL)
        if rung <= Rung.ATTENTION:
            kept.x2 = x2
        return x2, down, kept

    def _query_key_value(self, x: Tensor, delta: Tensor | None, run: Pass) -> Kept:
        linear = run.at_work(self.qkv)
        cat = linear.empty_cat(len(x))
        x, rstd = run.kernels.add_rms_norm(x, delta, self.norm1, self.eps, cat[:, : self.qkv.features])
        xa = linear.project(cat)
        before = linear.forward(cat)
        qkv = before if self.head_norms is None else torch.empty_like(before)
        run.kernels.rope(before, self.heads, run.cos, run.sin, run.positions, self.head_norms, qkv)
        return Kept(x, rstd, xa, qkv, None if self.head_norms is None else before)

    def _attend(self, kept: Kept, run: Pass) -> Attended:
        assert kept.qkv is not None
        return attend(kept.qkv, self.heads, run.layout, self.window, self.scale, run.backend)

    def _project_out(self, kept: Kept, run: Pass) -> Tensor:
        """o_proj's output [N, d]."""
        assert kept.attended is not None
        linear = run.at_work(self.out)
        cat = linear.empty_cat(len(kept.x))
        kept.xa_out = linear.project(cat, source=kept.attended.out)
        return linear.forward(cat)

    def _mlp(self, kept: Kept, attention_out: Tensor, run: Pass, keep: bool) -> tuple[Tensor, Tensor]:
        """The second half; ``attention_out`` becomes what it reads."""
        gate_up, down = self._mlp_linears(run)
        result = torch.empty_like(kept.x)
        for first, last in tiles(len(result)):
            made = self._gate_up(kept.x[first:last], attention_out[first:last], gate_up, first)
            cat = down.empty_cat(last - first)
            run.kernels.swiglu(made.out, cat[:, : self.down.features])
            kept.tiles.append(Tile(down.project(cat, first), made if keep else None))
            down.forward(cat, result[first:last])
        return attention_out, result

    def _mlp_linears(self, run: Pass) -> tuple[Linear, Linear]:
        return run.at_work(self.gate_up), run.at_work(self.down)

    def _gate_up(self, x: Tensor, delta: Tensor | None, linear: Linear, first: int) -> GateUp:
        """Of a tile, from the residual stream and what attention adds to it, which becomes their sum."""
        cat = linear.empty_cat(len(x))
        _, rstd = linear.kernels.add_rms_norm(x, delta, self.norm2, self.eps, cat[:, : self.gate_up.features])
        xa = linear.project(cat, first)
        return GateUp(linear.forward(cat), xa, rstd)

    # ---- backward ----

    def backward(self, dx: Tensor, kept: Kept, run: Pass, input_needed: bool) -> None:
        """Turn the gradient of the block's output into that of its input, in place, and add the adapter's gradients.

        What is computed again is computed as it was, from the same values in the same shapes: every rung gives the same bits.

        Args:
            dx: [N, d].
            kept: of the forward; it is used up.
            run: as there.
            input_needed: False for the first block, whose input has no parameter before it.
        """
        if kept.x2 is None:
            self._again(kept, run)
            kept.attended = self._attend(kept, run)
            kept.x2 = self._project_out(kept, run).add_(kept.x)
        self._mlp_backward(dx, kept.x2, kept.tiles, run)
        kept.x2 = None
        if kept.qkv is None:
            self._again(kept, run)
        self._attention_backward(dx, kept, run, input_needed)

    def _again(self, kept: Kept, run: Pass) -> None:
        """q, k and v once more."""
        again = self._query_key_value(kept.x, None, run)
        kept.rstd1, kept.xa_qkv, kept.qkv, kept.qkv_before = again.rstd1, again.xa_qkv, again.qkv, again.qkv_before

    def _mlp_backward(self, dx: Tensor, x2: Tensor, kept: list[Tile], run: Pass) -> None:
        gate_up, down = self._mlp_linears(run)
        for first, last in tiles(len(dx)):
            tile = kept.pop(0)
            made = tile.made or self._gate_up(x2[first:last], None, gate_up, first)
            down.through_swiglu(down.backward(dx[first:last], tile.xa_down), made.out, first)  # made.out is now its gradient
            dy = gate_up.through_lora(gate_up.backward(made.out, made.xa), x2[first:last], first, (made.rstd, self.norm2))
            run.kernels.rms_norm_backward(dy, x2[first:last], made.rstd, self.norm2, dx[first:last])

    def _attention_backward(self, dx: Tensor, kept: Kept, run: Pass, input_needed: bool) -> None:
        assert kept.attended is not None and kept.qkv is not None and kept.xa_out is not None
        assert kept.rstd1 is not None and kept.xa_qkv is not None
        out = run.at_work(self.out)
        dout = out.through_lora(out.backward(dx, kept.xa_out), kept.attended.out)
        del out
        dq, dk, dv = attend_backward(dout, kept.qkv, kept.attended, self.heads, run.layout, self.window, self.scale, run.backend)
        kept.attended = None
        dqkv, kept.qkv = kept.qkv, None  # its memory is free to take the gradient
        run.kernels.rope_backward(dq, dk, dv, kept.qkv_before, self.heads, run.cos, run.sin, run.positions, self.head_norms, dqkv)
        del dq, dk, dv, dout
        qkv = run.at_work(self.qkv)
        dcat = qkv.backward(dqkv, kept.xa_qkv, input_needed)
        dy = qkv.through_lora(dcat, kept.x, norm=(kept.rstd1, self.norm1), input_needed=input_needed)
        if input_needed:
            run.kernels.rms_norm_backward(dy, kept.x, kept.rstd1, self.norm1, dx)


def tiles(tokens: int) -> list[tuple[int, int]]:
    """The first and last + 1 token of each tile."""
    return [(first, min(first + MLP_TILE, tokens)) for first in range(0, tokens, MLP_TILE)]
