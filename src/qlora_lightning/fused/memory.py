"""The memory of a run on the fused path: what may be used, what is taken, what blocks keep of each shape; corrected by what a step took."""

from dataclasses import dataclass, replace

import torch

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import GIB, Budget, describe_rungs, plan_rungs, planned_bytes
from qlora_lightning.fused.microbatch import Shape
from qlora_lightning.fused.rungs import BlockShape, Rung
from qlora_lightning.kernels.attention import Backend
from qlora_lightning.strategies.policy import MemoryPolicy

CONTEXT = GIB // 2
"""Bytes that CUDA takes for itself, at least; about 0.8 GiB (H200) with the kernels of a first step, loaded as they are called."""


@dataclass(frozen=True)
class OptimizerState:
    """Bytes of the optimizer's two moments."""

    whole: int
    """What they take in all, once the first update has made them."""
    there: int = 0
    """What is there already: that of a resumed run."""
    paged: int = 0
    """How much of that lies in unified memory, which torch does not count as allocated."""


@dataclass(frozen=True)
class Before:
    """A device's memory before a microbatch."""

    allocated: int
    peak: int


class Planner:
    """Plans what blocks keep, shape by shape.

    Args:
        block: sizes of a block.
        layers: number of blocks.
        vocabulary: rows of the head.
        policy: what blocks keep, and how much memory there is.
        state: of the optimizer.
        device: where the run trains.
    """

    def __init__(
        self, block: BlockShape, layers: int, vocabulary: int, policy: MemoryPolicy, state: OptimizerState, device: torch.device
    ) -> None:
        self._block, self._layers, self._vocabulary = block, layers, vocabulary
        self._policy, self._state, self._device = policy, state, device
        self._budget: Budget | None = None
        self._elsewhere = 0
        self._paged_out = False

    @property
    def budget(self) -> Budget:
        """What may be used, on a GPU."""
        assert self._budget is not None
        return self._budget

    @property
    def plans(self) -> bool:
        """Whether what is kept follows from the memory that there is."""
        return self._policy.gradient_checkpointing == "auto" and self._device.type == "cuda"

    def start(self) -> None:
        """Measure what there is, as the first microbatch comes: everything is in place but the optimizer's state."""
        if self._budget is None and self._device.type == "cuda":
            self._budget = self._measure_budget()
            torch.cuda.reset_peak_memory_stats(self._device)  # the first step's own peak corrects the plan

    def count_state(self, there: int, paged: int) -> None:
        """Bytes of the optimizer's state that are there before the first microbatch, and how many of them lie in unified memory."""
        self._state = replace(self._state, there=there, paged=paged)

    def _measure_budget(self) -> Budget:
        """What may be used in all, and what is taken already; the optimizer's state, which the first update makes, with it."""
        self._elsewhere, total = taken_elsewhere(self._device, self._state.paged)
        to_come = self._state.whole - (self._state.there - self._state.paged)
        return budget_within(self._policy, total, self._elsewhere, torch.cuda.memory_allocated(self._device) + to_come)

    def plan(self, shape: Shape, backend: Backend) -> list[Rung]:
        """What each block keeps of a microbatch of this shape.

        Raises:
            UserError: it does not fit.
        """
        mode = self._policy.gradient_checkpointing
        if not self.plans:
            return [Rung.INPUT if mode == "full" else Rung.ALL] * self._layers
        rungs = self._fitting(shape, backend)
        peak = self.budget.held + self.needed(shape, rungs, backend)
        say(f"{shape.tokens:,} tokens a microbatch: {describe_rungs(rungs)}; {peak / GIB:.1f} of {self.budget.total / GIB:.1f} GiB planned")
        return rungs

    def _fitting(self, shape: Shape, backend: Backend) -> list[Rung]:
        """The rungs of ``plan_rungs``; beside the optimizer's state if it can be, else, where it is paged, while that is on the host."""
        block = self._block_of(shape, backend)
        movable = self._state.whole if self._policy.paged_optimizer and not self._paged_out else 0
        rungs, budget = fitting_rungs(block, self._layers, shape, self._vocabulary, self.budget, movable)
        if budget != self.budget:
            self._budget, self._paged_out = budget, True
            say("The optimizer's state does not fit beside a microbatch: it waits in host memory, which takes time at each update")
        return rungs

    def keeps_all(self, shape: Shape, backend: Backend) -> bool:
        """Whether a microbatch fits with everything kept."""
        return self.needed(shape, [Rung.ALL] * self._layers, backend) <= self.budget.free

    def hold(self, num_bytes: int) -> None:
        """Count so many bytes more (or, negative, less) as taken for good."""
        self._budget = replace(self.budget, held=self.budget.held + num_bytes)

    def needed(self, shape: Shape, rungs: list[Rung], backend: Backend) -> int:
        """Bytes that a microbatch takes for its time."""
        return int(self._planned(shape, rungs, backend) * self.budget.correction)

    def before(self) -> Before:
        """To be asked for as an eager microbatch begins, for ``correct``."""
        return Before(torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device))

    def correct(self, before: Before, shape: Shape, rungs: list[Rung], backend: Backend) -> bool:
        """Compare an eager microbatch with its plan, and CUDA's context with what it was; whether plans are made otherwise from now on.

        One that stayed below an earlier peak tells nothing: torch keeps the highest only.
        """
        peak = torch.cuda.max_memory_allocated(self._device)
        if peak == before.peak:
            return False
        ratio = (peak - before.allocated) / self._planned(shape, rungs, backend)
        known = self.budget.correction
        if known != 1.0 and ratio < known * 1.02:
            return False
        if known == 1.0:  # the first, before any update makes state that would look like it
            self.hold(max(0, taken_elsewhere(self._device, self._state.paged)[0] - self._elsewhere))
        self._budget = replace(self.budget, correction=max(ratio, 0.8))  # a plan that was too careful is trusted only so far
        return True

    def _planned(self, shape: Shape, rungs: list[Rung], backend: Backend) -> int:
        return planned_bytes(self._block_of(shape, backend), shape.tokens, rungs, self._vocabulary)

    def _block_of(self, shape: Shape, backend: Backend) -> BlockShape:
        return block_under(self._block, shape, backend, torch.cuda.get_device_properties(self._device).multi_processor_count)


def taken_elsewhere(device: torch.device, paged: int = 0) -> tuple[int, int]:
    """Bytes of a GPU that are neither free nor this process's tensors, and bytes that it has in all.

    Args:
        device: the GPU.
        paged: bytes in unified memory, which count as the optimizer's, wherever they lie.
    """
    free, total = torch.cuda.mem_get_info(device)
    # CUDA's context, and other processes
    return max(total - free - torch.cuda.memory_reserved(device) - paged, CONTEXT), total


def budget_within(policy: MemoryPolicy, total: int, elsewhere: int, held: int) -> Budget:
    """What a run may use of a device.

    Args:
        policy: may allow the run less than the device has.
        total: bytes of the device.
        elsewhere: bytes of CUDA's context and of other processes.
        held: bytes that the run itself has taken before a step.
    """
    allowed = policy.memory_budget_gib
    if allowed is not None and policy.gradient_checkpointing == "auto":  # of this run alone, as far as others leave it
        context = min(elsewhere, GIB)
        total, elsewhere = min(int(allowed * GIB), total - elsewhere + context), context
    return Budget(total, held + elsewhere)


def fitting_rungs(block: BlockShape, layers: int, shape: Shape, vocabulary: int, budget: Budget, movable: int) -> tuple[list[Rung], Budget]:
    """The rungs of ``plan_rungs``; beside the optimizer's state if it can be, else, where it is paged, while that is on the host.

    Args:
        block: sizes of a block.
        layers: number of blocks.
        shape: of the microbatch.
        vocabulary: rows of the head.
        budget: what they may take.
        movable: bytes of paged state among what is held.

    Returns:
        What each block keeps, and the budget that it was planned in.

    Raises:
        UserError: the microbatch does not fit.
    """
    length = shape.longest or shape.length
    try:
        return plan_rungs(block, layers, shape.tokens, length, vocabulary, budget), budget
    except UserError:
        if not movable:
            raise
    without = replace(budget, held=budget.held - movable)
    return plan_rungs(block, layers, shape.tokens, length, vocabulary, without), without


def block_under(block: BlockShape, shape: Shape, backend: Backend, processors: int) -> BlockShape:
    """``block`` with what attention's backward needs there of a GPU with so many multiprocessors."""
    if backend not in ("flash", "varlen"):
        return block
    # FlashAttention 2 in a fixed order: each part of the device that works on the same row sums by itself.
    work = (shape.sequences or shape.rows) * block.heads
    return replace(block, dq_copies=-(-processors // work))
