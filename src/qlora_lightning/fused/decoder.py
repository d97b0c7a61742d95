"""A whole LLaMA-family decoder with LoRA, forward and backward by hand: token ids in, cross-entropy out, gradients into the flat adapter.

Shapes: N tokens of a microbatch, P scored positions, d hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from qlora_lightning.fused.block import Block, Kept, Pass
from qlora_lightning.fused.linear import Linear, expand
from qlora_lightning.fused.offload import HostInputs
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels.attention import Backend, Layout, choose_backend
from qlora_lightning.kernels.heads import Heads

LOGITS_BYTES = 2**28
"""Logits are held of so many positions at once as fit in this."""


@dataclass
class Tokens:
    """A microbatch as the decoder reads it; every tensor lies on its device."""

    ids: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int32: the position of each token in its own sequence."""
    scored: Tensor
    """[P] int64: tokens whose next one is a target; N stands for none, in what is padded."""
    targets: Tensor
    """[P] int64: -100 in what is padded."""
    seed: Tensor
    """[1] int64: of the dropout."""
    layout: Layout


@dataclass
class Forward:
    """What a forward leaves for its backward."""

    losses: Tensor
    """[P] fp32: cross-entropy of each scored position."""
    run: Pass
    kept: list[Kept]
    """Of each block; backward takes them off."""
    last: "Last | None"
    """Likewise."""


@dataclass(frozen=True)
class Last:
    """What the last norm leaves at the scored positions."""

    x: Tensor
    """[P, d]: what it read."""
    rstd: Tensor
    """[P] fp32."""
    dnormed: Tensor
    """[P, d]: gradient of the sum of the losses by what it gave."""


@dataclass(frozen=True)
class Decoder:
    """The weights, and the kernels that pass over them.

    Attributes:
        kernels: ``kernels.triton_ops`` on a GPU, ``kernels.reference`` elsewhere.
        embedding: [V, d].
        head: [V, d]; may be ``embedding``.
        blocks: in order.
        norm: [d] fp32, the last norm's weight.
        eps: of the norms.
        cos: [positions, D / 2] fp32: RoPE's table.
        sin: likewise.
        name: of the family, for the log.
        linear: how products with frozen weights are computed.
        reproducible: two runs are equal bit for bit.
        expanded: weights that stay in the dtype of the products, by their group's ``stream``: those of ``expand``.
    """

    kernels: ModuleType
    embedding: Tensor
    head: Tensor
    blocks: Sequence[Block]
    norm: Tensor
    eps: float
    cos: Tensor
    sin: Tensor
    name: str
    linear: type[Linear] = Linear
    reproducible: bool = True
    expanded: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def heads(self) -> Heads:
        """Of every block."""
        return self.blocks[0].heads

    def backend(self, layout: Layout) -> Backend:
        """What attention is computed with."""
        windows = [block.window for block in self.blocks if block.window is not None]
        return choose_backend(self.embedding.device, layout, self.heads, min(windows, default=None), self.reproducible)

    @property
    def expanded_bytes(self) -> int:
        """Of one block whose weights stay in the dtype of the products; 0 where they cannot."""
        width = self.embedding.element_size() if self.linear is Linear else 0
        return sum(group.outputs * group.width for group in self.blocks[0].groups) * width

    def expand(self, count: int) -> None:
        """Keep the weights of the first ``count`` blocks in the dtype of the products, so that no pass dequantises them again."""
        for block in self.blocks[:count]:
            for group in block.groups:
                self.expanded[group.stream] = expand(group, self.kernels, self.embedding.dtype, self.embedding.device)

    def shrink(self) -> int:
        """Keep none of them any longer; the bytes that they took."""
        freed = sum(weight.nbytes for weight in self.expanded.values())
        self.expanded.clear()
        return freed

    def forward(self, tokens: Tokens, rungs: Sequence[Rung], host: HostInputs | None = None) -> Forward:
        """Losses of the scored positions, and what ``backward`` needs.

        Args:
            tokens: the microbatch.
            rungs: what each block keeps.
            host: where blocks' inputs wait that are all that a block keeps; None keeps them on the device.
        """
        backend = self.backend(tokens.layout)
        dtype = self.embedding.dtype
        run = Pass(
            self.kernels, tokens.layout, backend, self.cos, self.sin, tokens.positions, tokens.seed, dtype, self.linear, self.expanded
        )
        x, delta = self.embedding[tokens.ids], None
        kept = []
        for number, (block, rung) in enumerate(zip(self.blocks, rungs, strict=True)):
            x, delta, memory = block.forward(x, delta, run, rung)
            kept.append(memory)
            if host is not None and rung == Rung.INPUT:
                host.put(number, memory.x)
                del memory.x
        if host is not None:
            host.finish()
        assert delta is not None
        rows = tokens.scored.clamp(max=len(x) - 1)
        return self._head(x[rows], delta[rows], tokens.targets, run, kept)

    def _head(self, x_Pd: Tensor, delta_Pd: Tensor, targets: Tensor, run: Pass, kept: list[Kept]) -> Forward:
        """Last norm, head and cross-entropy at the scored positions, a part of the logits at a time, with the gradient at once."""
        normed = torch.empty_like(x_Pd)
        last, rstd = self.kernels.add_rms_norm(x_Pd, delta_Pd, self.norm, self.eps, normed)
        losses = []
        step = max(1, LOGITS_BYTES // (self.head.shape[0] * self.head.element_size()))
        for first in range(0, len(normed), step):
            part = normed[first : first + step]
            logits = torch.mm(part, self.head.t())
            losses.append(self.kernels.cross_entropy(logits, targets[first : first + step]))
            torch.mm(logits, self.head, out=part)  # the logits hold their gradient now; this part of ``normed`` is not read again
        return Forward(torch.cat(losses), run, kept, Last(last, rstd, normed))

    def backward(self, state: Forward, tokens: Tokens, scale: Tensor, host: HostInputs | None = None) -> None:
        """Add the gradient of ``scale`` times the sum of the losses to the adapter's.

        Args:
            state: the forward's; its memory is given up block by block.
            tokens: the same microbatch.
            scale: scalar fp32 on the device.
            host: as in the forward.
        """
        dx = self._last_backward(state, tokens, scale)
        for number in reversed(range(len(self.blocks))):
            memory = state.kept.pop()
            if host is not None and not hasattr(memory, "x"):
                memory.x = host.take(number)
            self.blocks[number].backward(dx, memory, state.run, input_needed=number > 0)

    def _last_backward(self, state: Forward, tokens: Tokens, scale: Tensor) -> Tensor:
        """The gradient of the last block's output [N, d]."""
        assert state.last is not None
        last, state.last = state.last, None
        dlast = torch.zeros_like(last.x)
        self.kernels.rms_norm_backward(last.dnormed, last.x, last.rstd, self.norm * scale, dlast)
        count, width = len(tokens.ids), dlast.shape[1]
        dx = torch.zeros(count + 1, width, dtype=dlast.dtype, device=dlast.device)  # the row behind takes what is padded
        return dx.index_copy_(0, tokens.scored, dlast)[:count]
