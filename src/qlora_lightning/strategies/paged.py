"""What every strategy of ours shares: it states a memory policy, moves no 4-bit base, and keeps optimizer state paged after a resume."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from qlora_lightning.optim import load_optimizer_state
from qlora_lightning.strategies.checkpoint_io import AtomicCheckpointIO
from qlora_lightning.strategies.policy import GradientCheckpointing, MemoryPolicy

T = TypeVar("T")


class PagedStrategy(Strategy):
    """A strategy under a memory policy, of one device or of many; for use before one of Lightning's among the bases of a class.

    Args:
        paged_optimizer: Keep AdamW's state in unified memory, so that a spike pages it out to the host instead of ending the run.
            On a CPU this has no meaning and a plain AdamW is used.
        optimizer_bits: Bits of each of AdamW's two moments: 32, or 8 (block-wise quantised).
        gradient_checkpointing: ``auto`` keeps as many activations as the memory budget allows and computes the rest again in backward.
            ``full`` keeps each block's input only: least memory, about a third more compute. ``none`` keeps all activations. Without
            the fused path (``model.fused``) ``auto`` is ``full``.
        memory_budget_gib: What the run may use in all, in GiB on each device, at least 1; for ``auto`` only. By default what is free on the
            device when the run starts, less a margin.
        offload_inputs: Let the inputs that blocks keep wait in pinned host memory until backward: for long contexts, on the fused path.
    """

    def __init__(
        self,
        paged_optimizer: bool = True,
        optimizer_bits: Literal[32, 8] = 32,
        gradient_checkpointing: GradientCheckpointing = "auto",
        memory_budget_gib: float | None = None,
        offload_inputs: bool = False,
    ) -> None:
        super().__init__(checkpoint_io=AtomicCheckpointIO())
        self.policy = MemoryPolicy(paged_optimizer, optimizer_bits, gradient_checkpointing, memory_budget_gib, offload_inputs)

    def sum_over_ranks(self, *tensors: Tensor) -> None:
        """Add up each tensor over all ranks, in place: the adapter's gradient, once an optimizer step."""

    def of_every_rank(self, value: T) -> list[T]:
        """What each rank gives, in order of ranks; plain values, not every step."""
        return [value]

    def on_first_rank(self, work: Callable[[], None]) -> None:
        """Do ``work`` on rank 0 alone; the others wait until it is done.

        Raises:
            Exception: what ``work`` raised, on rank 0.
            ElsewhereError: the same, on the others.
        """
        work()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state as plain tensors in host memory: paged ones carry attributes and an allocation that must not be pickled.

        Nothing but on rank 0, which writes; the others' is the same.
        """
        if not self.is_global_zero:
            return {}
        if self.root_device.type == "cuda":
            torch.cuda.synchronize(self.root_device)  # paged state may still be written by the last update
        state = super().optimizer_state(optimizer)
        return apply_to_collection(state, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore optimizer state where it belongs. Lightning and bitsandbytes would both turn paged state into plain device tensors."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_state(optimizer, state)

    def teardown(self) -> None:
        """Release what Lightning holds, but leave the model where it is.

        The base class moves it to the CPU after every fit and validate, which for a 4-bit 65B means 40 GB of copies.
        """
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
