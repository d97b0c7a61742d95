"""The fused path of a run: a microbatch in, its loss with a gradient out, through captured graphs where shapes come again.

A shape's first microbatch runs eagerly, which compiles the kernels and measures memory; its second is captured as two CUDA graphs, one
of the forward and one of the backward, and every one after that is two launches. All graphs share one memory pool: they run one after
another, and backward follows its own forward.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import GIB, Budget, describe_rungs, plan_rungs, planned_bytes
from qlora_lightning.fused.decoder import Decoder, Forward, Tokens
from qlora_lightning.fused.family import NotFused, fuse
from qlora_lightning.fused.fp8 import in_fp8
from qlora_lightning.fused.microbatch import PACKED_STEP, Shape, empty_tokens, fill, shape_of
from qlora_lightning.fused.offload import HostInputs
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels.attention import describe
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.modeling.loading import FP8_SAID
from qlora_lightning.modeling.positions import positions_of
from qlora_lightning.strategies.policy import MemoryPolicy

LEAST_POSITIONS = 4096
"""Rows of RoPE's table at least: padding counts positions too, and some models do not say how many they have."""
GRAPHS = 48
"""Shapes that get graphs at most; each takes some MiB of launch parameters."""


@dataclass
class Graphs:
    """A shape's captured forward and backward."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: Tensor
    """Scalar that the forward writes."""
    scale: Tensor
    """Scalar that the backward reads."""


@dataclass
class Place:
    """What belongs to one shape."""

    tokens: Tokens
    rungs: list[Rung]
    runs: int = 0
    graphs: Graphs | None = None
    state: Forward | None = field(default=None, repr=False)
    """Between an eager forward and its backward."""


class Runner:
    """Computes microbatches with a decoder.

    Args:
        decoder: the weights.
        flat: the adapter, whose gradients backward adds to.
        policy: what blocks keep, and how much memory there is.
        state_bytes: what the optimizer will take, on top of what is allocated when the first microbatch comes.
        graphs: False runs everything eagerly.
    """

    def __init__(self, decoder: Decoder, flat: FlatAdapter, policy: MemoryPolicy, state_bytes: int, graphs: bool) -> None:
        self.decoder, self.flat, self.policy = decoder, flat, policy
        self.device = decoder.embedding.device
        self._block = replace(decoder.blocks[0].shape, input_on_host=policy.offload_inputs)
        self._captures = graphs and not policy.offload_inputs
        self._host = self._host_inputs() if policy.offload_inputs and self.device.type == "cuda" else None
        self._allocated = 0
        self._state_bytes = state_bytes
        self._places: dict[Shape, Place] = {}
        self._budget: Budget | None = None
        self._pool: Any = None
        self._running = 0
        self._dropout = any(block.qkv.dropout for block in decoder.blocks)

    def cross_entropy_sum(self, batch: dict[str, Any]) -> Tensor:
        """Sum of cross-entropy over the microbatch's supervised tokens: a scalar whose backward adds to the adapter's gradients."""
        loss: Tensor = _Loss.apply(self.flat.parameter, self, batch)
        return loss

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The sum, and the backward that belongs to it, which must come before the next forward."""
        began = time.perf_counter()
        shape = shape_of(batch)
        if (length := shape.longest or shape.length) > len(self.decoder.cos):
            raise UserError(
                f"a row of {length:,} tokens is longer than the base model's positions; set data.dataset.max_length to what it can take"
            )
        if shape not in self._places:
            self._places[shape] = Place(empty_tokens(shape, self.device), self._plan(shape))
        place = self._places[shape]
        seed = int(torch.randint(2**62, ()).item()) if self._dropout else 0  # of the CPU's generator: saved and restored with a run
        fill(place.tokens, shape, batch, seed)
        place.runs += 1
        if self._captures and place.runs == 2 and sum(one.graphs is not None for one in self._places.values()) < GRAPHS:
            place.graphs = self._capture(place, shape)
        self._running += 1
        ticket = self._running
        loss = self._forward(place)

        def backward(scale: Tensor) -> None:
            assert ticket == self._running, "a microbatch's backward comes before the next one's forward"
            self._backward(place, scale)
            if ticket == 1:
                self._say_first(shape, began)
            if self._budget is not None and place.runs == 1:
                self._correct(place, shape)

        return loss, backward

    def _forward(self, place: Place) -> Tensor:
        if place.graphs is not None:
            place.graphs.forward.replay()
            return place.graphs.loss.clone()
        if self._host is not None:
            self._host.reserve(len(place.tokens.ids))
        place.state = self.decoder.forward(place.tokens, place.rungs, self._host)
        return place.state.losses.sum()

    def _backward(self, place: Place, scale: Tensor) -> None:
        if place.graphs is not None:
            place.graphs.scale.copy_(scale)
            place.graphs.backward.replay()
            return
        assert place.state is not None
        state, place.state = place.state, None
        self.decoder.backward(state, place.tokens, scale, self._host)

    def _say_first(self, shape: Shape, began: float) -> None:
        """What the first microbatch waited for, which later ones and later runs do not: Triton keeps compiled kernels on disk."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        backend = self.decoder.backend(empty_tokens(shape, self.device).layout)
        say(f"First microbatch in {time.perf_counter() - began:.1f} s, kernels compiled with it; attention by {describe(backend)}")

    # ---- memory ----

    def _host_inputs(self) -> HostInputs:
        embedding = self.decoder.embedding
        return HostInputs(len(self.decoder.blocks), embedding.shape[1], embedding.dtype, self.device)

    def _plan(self, shape: Shape) -> list[Rung]:
        """What each block keeps of a microbatch of this shape."""
        layers = len(self.decoder.blocks)
        if self.policy.gradient_checkpointing != "auto" or self.device.type == "cpu":
            return [Rung.INPUT if self.policy.gradient_checkpointing == "full" else Rung.ALL] * layers
        if self._budget is None:
            self._budget = self._measure_budget()
            torch.cuda.reset_peak_memory_stats(self.device)  # the first step's own peak corrects the plan
        block, vocabulary = self._block, len(self.decoder.head)
        rungs = plan_rungs(block, layers, shape.tokens, shape.longest or shape.length, vocabulary, self._budget)
        peak = self._budget.held + planned_bytes(block, shape.tokens, rungs, vocabulary) * self._budget.correction
        say(
            f"{shape.tokens:,} tokens a microbatch: {describe_rungs(rungs)}; {peak / GIB:.1f} of {self._budget.total / GIB:.1f} GiB planned"
        )
        return rungs

    def _measure_budget(self) -> Budget:
        """What may be used in all, and what is taken already; the optimizer's state, which the first update makes, with it."""
        free, total = torch.cuda.mem_get_info(self.device)
        elsewhere = total - free - torch.cuda.memory_reserved(self.device)  # CUDA's context, and other processes
        allowed = self.policy.memory_budget_gib
        if allowed is not None:
            total, elsewhere = min(total, int(allowed * GIB)), min(elsewhere, GIB)
        self._allocated = torch.cuda.memory_allocated(self.device)
        return Budget(total, self._allocated + elsewhere + self._state_bytes)

    def _correct(self, place: Place, shape: Shape) -> None:
        """Plan anew, for shapes that have no graphs yet, with what the eager step took."""
        assert self._budget is not None
        planned = planned_bytes(self._block, shape.tokens, place.rungs, len(self.decoder.head))
        measured = torch.cuda.max_memory_allocated(self.device) - self._allocated
        ratio = max(measured / planned, 0.8)  # a plan that was too careful is trusted only so far
        if (abs(ratio / self._budget.correction - 1) > 0.02 and ratio > self._budget.correction) or self._budget.correction == 1.0:
            self._budget = replace(self._budget, correction=ratio)
            for one_shape, one in self._places.items():
                if one.graphs is None:
                    one.rungs = self._plan(one_shape)

    # ---- graphs ----

    def _capture(self, place: Place, shape: Shape) -> Graphs:
        """Record the launches of a shape's forward and backward; nothing is computed."""
        began = time.perf_counter()
        torch.cuda.empty_cache()  # what the eager run left, which the graphs' own pool cannot use
        graphs = Graphs(torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.empty(0), torch.ones((), device=self.device))
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads (a loader that pins memory, a logger) may call CUDA while this one records.
        with torch.cuda.graph(graphs.forward, pool=self._pool, capture_error_mode="thread_local"):
            state = self.decoder.forward(place.tokens, place.rungs)
            graphs.loss = state.losses.sum()
        with torch.cuda.graph(graphs.backward, pool=self._pool, capture_error_mode="thread_local"):
            self.decoder.backward(state, place.tokens, graphs.scale)
        say(f"Captured {shape.rows} x {shape.length} tokens as CUDA graphs in {time.perf_counter() - began:.1f} s")
        return graphs


class _Loss(torch.autograd.Function):
    """Ties the runner's backward to autograd. The anchor's gradient is none: backward adds to the adapter's by itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, runner: Runner, batch: dict[str, Any]) -> Tensor:
        """The loss [scalar]; ``anchor`` is any tensor that requires a gradient."""
        loss, ctx.run_backward = runner.forward(batch)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        """Add the adapter's gradients."""
        ctx.run_backward(gradients[0])
        return None, None, None


def fused_runner(
    model: PeftModel,
    flat: FlatAdapter,
    policy: MemoryPolicy,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool = False,
    reproducible: bool = True,
) -> Runner | None:
    """The fused path of a run, or None where the device or the model needs transformers' own; both are said.

    Args:
        model: a 4-bit base with LoRA on ``device``.
        flat: its adapter.
        policy: of memory.
        device: where the run trains.
        dtype: of the products.
        fp8: compute those with frozen weights in e4m3.
        reproducible: two runs must be equal bit for bit.

    Raises:
        UserError: ``fp8`` is wanted of a model that the fused path does not know.
    """
    if device.type != "cuda":
        return None  # a CPU has no kernels to fuse for, and nobody expects it to
    if dtype != torch.bfloat16:
        say(f"Fused path: off, since it computes in bf16, not {str(dtype).removeprefix('torch.')}")
        return None
    from qlora_lightning.kernels import triton_ops  # Triton is part of torch's builds for CUDA only

    base: Any = model.get_base_model()
    longest = max(positions_of(base.config) or 0, LEAST_POSITIONS) + PACKED_STEP
    try:
        decoder = replace(fuse(model, flat, triton_ops, dtype, longest), reproducible=reproducible)
        if fp8:
            decoder = in_fp8(decoder)
    except NotFused as reason:
        if fp8:
            raise UserError(f"model.compute: fp8 cannot train this model ({reason}); set model.compute: bf16") from reason
        say(f"Fused path: off ({reason}); training through transformers' blocks")
        return None
    say(f"Fused path: {decoder.name} blocks by hand, shapes that come again as CUDA graphs")
    if fp8:
        say(f"Compute: {FP8_SAID}")
    return Runner(decoder, flat, policy, state_bytes=2 * flat.parameter.numel() * policy.optimizer_bits // 8, graphs=True)
