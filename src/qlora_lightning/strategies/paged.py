"""What every strategy of ours shares: it states a memory policy, moves no 4-bit base, and keeps optimizer state paged after a resume."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from qlora_lightning.optim import load_optimizer_state
from qlora_lightning.strategies.policy import MemoryPolicy

T = TypeVar("T")


class PagedStrategy(Strategy):
    """A strategy under a memory policy, of one device or of many."""

    policy: MemoryPolicy

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
