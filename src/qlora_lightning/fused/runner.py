"""The fused path of a run: a microbatch in, its loss with a gradient out, through captured graphs where shapes come again.

A shape's first microbatch runs eagerly, which compiles the kernels and measures memory; its second is captured as two CUDA graphs, one
of the forward and one of the backward, and every one after that is two launches. Shapes so large that the host launches kernels nearly
as fast as the GPU runs them are captured late, since a capture costs as much as it saves them in many microbatches; larger ones never.
All graphs share one memory pool: they run one after another, and backward follows its own forward. That memory serves nothing else:
where it is short, the graphs are given up before a new shape runs eagerly and before transformers' own blocks run (validation, samples),
and captured again when their shapes come. Where memory is plentiful, frozen weights stay in 16 bits.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import GIB, left_for_weights
from qlora_lightning.fused.decoder import Decoder, Forward, Tokens
from qlora_lightning.fused.memory import OptimizerState, Planner
from qlora_lightning.fused.microbatch import Shape, empty_tokens, fill, shape_of
from qlora_lightning.fused.offload import HostInputs
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels.attention import Backend, describe
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.strategies.policy import MemoryPolicy

GRAPHS = 48
"""Shapes that get graphs at most; each takes some MiB of launch parameters."""
LAUNCHED_LATE, LAUNCHED_IN_TIME = 0.53e12, 0.8e12
"""Tokens times a block's weights. Below the first the GPU waits for the host, and a graph is soon worth its capture: at 7B, where these are
2,600 tokens, launching packed rows with dropout took about 150 ms, what the GPU computes in 110 where they are 2,048; a capture costs 230.
From the second on, 4,000 tokens, it never is (H200)."""
SEEN, SEEN_OFTEN = 1, 24
"""Microbatches of a shape after which it is captured: below the first of these bounds, and between the two."""


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
    ran: int = 0
    """Microbatches that have come through, and back, eagerly."""
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
        if place.ran:
            self._expand()
            if self._to_be_captured(place, shape):
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
            place.ran += place.graphs is None
            if ticket == 1:
                self._say_first(place, began)
            if before is not None and self.planner.correct(before, shape, place.rungs, place.backend):
                self._plan_again()

        return loss, backward

    def _place(self, shape: Shape) -> Place:
        if shape not in self._places:
            tokens = empty_tokens(shape, self.device)
            backend = self.decoder.backend(tokens.layout)
            if self.decoder.expanded and not self.planner.keeps_all(shape, backend):
                self._drop_graphs()  # and the weights in 16 bits: activations that are kept save more
            self._places[shape] = Place(tokens, backend, self.planner.plan(shape, backend))
        return self._places[shape]

    def _plan_again(self) -> None:
        """For shapes that have no graphs yet. One that has run and fits no longer, margin counted, goes on as it did."""
        if self.decoder.expanded and not all(self.planner.keeps_all(shape, place.backend) for shape, place in self._places.items()):
            self._drop_graphs()
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

    # ---- what stays from microbatch to microbatch ----

    def _expand(self) -> None:
        """Keep weights in 16 bits where memory is left over, before any graph holds the address of others."""
        each = self.decoder.expanded_bytes
        if not self.planner.plans or self.decoder.expanded or self._pool is not None or not each:
            return
        needed = max(self.planner.needed(shape, place.rungs, place.backend) for shape, place in self._places.items())
        blocks = len(self.decoder.blocks)
        if count := min(blocks, left_for_weights(self.planner.budget, needed) // each):
            self.decoder.expand(count)
            self.planner.hold(count * each)
            say(f"Weights of {count} of {blocks} blocks stay in 16 bits, {count * each / GIB:.1f} GiB that would be left over")

    def _to_be_captured(self, place: Place, shape: Shape) -> bool:
        work = shape.tokens * self.decoder.blocks[0].parameters
        worth_it = work < LAUNCHED_IN_TIME and place.ran >= (SEEN if work < LAUNCHED_LATE else SEEN_OFTEN)
        return self._captures and worth_it and place.graphs is None and len(self._captured()) < GRAPHS

    def _captured(self) -> list[Place]:
        return [place for place in self._places.values() if place.graphs is not None]

    def give_up_graphs(self, wanted: int | None = None) -> None:
        """Free the memory of graphs, and of weights in 16 bits, where others are about to need it.

        Args:
            wanted: bytes that will be taken beside it; None where that is not known, and as much again must be left.
        """
        if self._pool is None and not self.decoder.expanded:
            return
        if self.planner.budget.free - self._pool_bytes < (self._pool_bytes if wanted is None else wanted):
            self._drop_graphs()

    def _drop_graphs(self) -> None:
        torch.cuda.synchronize(self.device)  # one may be running
        for place in self._captured():
            place.graphs = None
        self._pool, self._pool_bytes = None, 0
        if self.decoder.expanded:
            self.planner.hold(-self.decoder.shrink())
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
