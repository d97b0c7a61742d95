"""The fused path of a run: a microbatch in, its loss with a gradient out, through captured graphs where shapes come again.

A shape's first microbatch runs eagerly, which compiles the kernels and measures memory; its second is captured as two CUDA graphs, one
of the forward and one of the backward, and every one after that is two launches. All graphs share one memory pool: they run one after
another, and backward follows its own forward. That memory serves nothing else: where it is short, the graphs are given up before a new
shape runs eagerly and before transformers' own blocks run (validation, samples), and captured again when their shapes come.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from peft import PeftModel
from torch import Tensor

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.fused.decoder import Decoder, Forward, Tokens
from qlora_lightning.fused.family import NotFused, fuse
from qlora_lightning.fused.fp8 import in_fp8
from qlora_lightning.fused.memory import OptimizerState, Planner
from qlora_lightning.fused.microbatch import PACKED_STEP, Shape, empty_tokens, fill, shape_of
from qlora_lightning.fused.offload import HostInputs
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels.attention import Backend, describe
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
    backend: Backend
    """Of its attention."""
    rungs: list[Rung]
    ran: bool = False
    """Whether a microbatch has come through, and back."""
    graphs: Graphs | None = None
    state: Forward | None = field(default=None, repr=False)
    """Between an eager forward and its backward."""


class Runner:
    """Computes microbatches with a decoder.

    Args:
        decoder: the weights.
        flat: the adapter, whose gradients backward adds to.
        policy: what blocks keep, and how much memory there is.
        state_bytes: what the optimizer's state will take.
        graphs: False runs everything eagerly.
    """

    def __init__(self, decoder: Decoder, flat: FlatAdapter, policy: MemoryPolicy, state_bytes: int, graphs: bool) -> None:
        self.decoder, self.flat, self.policy = decoder, flat, policy
        self.device = decoder.embedding.device
        block = replace(decoder.blocks[0].shape, input_on_host=policy.offload_inputs)
        self.planner = Planner(block, len(decoder.blocks), len(decoder.head), policy, OptimizerState(state_bytes), self.device)
        self._captures = graphs and not policy.offload_inputs
        self._host = self._host_inputs() if policy.offload_inputs and self.device.type == "cuda" else None
        self._places: dict[Shape, Place] = {}
        self._pool: Any = None
        self._pool_bytes = 0
        self._ticket = 0
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
        self.planner.start()
        place = self._place(shape)
        seed = int(torch.randint(2**62, ()).item()) if self._dropout else 0  # of the CPU's generator: saved and restored with a run
        fill(place.tokens, shape, batch, seed)
        if self._captures and place.ran and place.graphs is None and len(self._captured()) < GRAPHS:
            self._try_capture(place, shape)
        run_eagerly = place.graphs is None and self.device.type == "cuda"
        if run_eagerly:
            self.give_up_graphs(self.planner.needed(shape, place.rungs, place.backend))
        before = self.planner.before() if run_eagerly else None
        self._ticket += 1
        ticket = self._ticket
        loss = self._forward(place)

        def backward(scale: Tensor) -> None:
            assert ticket == self._ticket, "a microbatch has one backward, before the next one's forward"
            self._ticket += 1  # what it kept is used up
            self._backward(place, scale)
            place.ran = True
            if ticket == 1:
                self._say_first(place, began)
            if before is not None and self.planner.correct(before, shape, place.rungs, place.backend):
                self._plan_again()

        return loss, backward

    def _place(self, shape: Shape) -> Place:
        if shape not in self._places:
            tokens = empty_tokens(shape, self.device)
            backend = self.decoder.backend(tokens.layout)
            self._places[shape] = Place(tokens, backend, self.planner.plan(shape, backend))
        return self._places[shape]

    def _plan_again(self) -> None:
        """For shapes that have no graphs yet. One that has run and fits no longer, margin counted, goes on as it did."""
        for shape, place in self._places.items():
            if place.graphs is None:
                with suppress(UserError):
                    place.rungs = self.planner.plan(shape, place.backend)

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

    def _say_first(self, place: Place, began: float) -> None:
        """What the first microbatch waited for, which later ones and later runs do not: Triton keeps compiled kernels on disk."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        say(f"First microbatch in {time.perf_counter() - began:.1f} s, kernels compiled with it; attention by {describe(place.backend)}")

    def _host_inputs(self) -> HostInputs:
        embedding = self.decoder.embedding
        return HostInputs(len(self.decoder.blocks), embedding.shape[1], embedding.dtype, self.device)

    # ---- graphs ----

    def _captured(self) -> list[Place]:
        return [place for place in self._places.values() if place.graphs is not None]

    def give_up_graphs(self, wanted: int | None = None) -> None:
        """Free the graphs' memory where others are about to need it.

        Args:
            wanted: bytes that will be taken beside it; None where that is not known, and as much again must be left.
        """
        if self._pool is None:
            return
        if self.planner.budget.free - self._pool_bytes < (self._pool_bytes if wanted is None else wanted):
            self._drop_graphs()

    def _drop_graphs(self) -> None:
        torch.cuda.synchronize(self.device)  # one may be running
        for place in self._captured():
            place.graphs = None
        self._pool = None
        torch.cuda.empty_cache()

    def _try_capture(self, place: Place, shape: Shape) -> None:
        """Capture a shape; where memory has become too short, go on without graphs, for good if this one had it all to itself."""
        try:
            place.graphs = self._capture(place, shape)
        except torch.OutOfMemoryError:
            self._captures = bool(self._captured())
            say(f"Too little memory to capture {shape.rows} x {shape.length} tokens as CUDA graphs; they are computed without")
        if place.graphs is None:
            self._drop_graphs()  # here, where the failed capture's own tensors are gone

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
        self._pool_bytes = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
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
    base: Any = model.get_base_model()
    try:
        decoder = replace(fuse(model, flat, _triton_kernels(), dtype, rope_positions(base.config)), reproducible=reproducible)
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
    runner = Runner(decoder, flat, policy, state_bytes=2 * flat.parameter.numel() * policy.optimizer_bits // 8, graphs=True)
    known = ref(runner)  # the base may outlive its runner, with the memory of its graphs
    base.model.register_forward_pre_hook(lambda *_: give_way(known()))  # validation, samples and the like
    return runner


def rope_positions(config: Any) -> int:
    """Rows of RoPE's table for a model of this configuration."""
    return max(positions_of(config) or 0, LEAST_POSITIONS) + PACKED_STEP


def give_way(runner: Runner | None) -> None:
    """Free the memory of a runner's graphs where that is short; None is one that has gone."""
    if runner is not None:
        runner.give_up_graphs()


def _triton_kernels() -> ModuleType:
    """Triton comes with torch's builds for CUDA on Linux only."""
    if importlib.util.find_spec("triton") is None:
        raise NotFused("Triton is not installed")
    return importlib.import_module("qlora_lightning.kernels.triton_ops")
