"""``strategy: qlora``: one device, a 4-bit base that is never moved, and optimizer state that stays paged after a resume."""

from typing import Literal

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from qlora_lightning.errors import UserError
from qlora_lightning.strategies.checkpoint_io import AtomicCheckpointIO
from qlora_lightning.strategies.paged import PagedStrategy
from qlora_lightning.strategies.policy import GradientCheckpointing, MemoryPolicy


class QLoRAStrategy(PagedStrategy, SingleDeviceStrategy):
    """Train on one device under a memory policy.

    Args:
        paged_optimizer: Keep AdamW's state in unified memory, so that a spike pages it out to the host instead of ending the run.
            On a CPU this has no meaning and a plain AdamW is used.
        optimizer_bits: Bits of each of AdamW's two moments: 32, or 8 (block-wise quantised).
        gradient_checkpointing: ``auto`` keeps as many activations as the memory budget allows and computes the rest again in backward.
            ``full`` keeps each block's input only: least memory, about a third more compute. ``none`` keeps all activations. Without
            the fused path (``model.fused``) ``auto`` is ``full``.
        memory_budget_gib: What the run may use in all, in GiB, at least 1; for ``auto`` only. By default what is free on the device when
            the run starts, less a margin.
        offload_inputs: Let the inputs that blocks keep wait in pinned host memory until backward: for long contexts, on the fused path.
    """

    strategy_name = "qlora"

    def __init__(
        self,
        paged_optimizer: bool = True,
        optimizer_bits: Literal[32, 8] = 32,
        gradient_checkpointing: GradientCheckpointing = "auto",
        memory_budget_gib: float | None = None,
        offload_inputs: bool = False,
    ) -> None:
        SingleDeviceStrategy.__init__(self, checkpoint_io=AtomicCheckpointIO())
        self.policy = MemoryPolicy(paged_optimizer, optimizer_bits, gradient_checkpointing, memory_budget_gib, offload_inputs)
        self._parallel_devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices that the Trainer chose; it sets them because this attribute exists, and this strategy uses the only one."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and len(devices) > 1:
            raise UserError(f"strategy qlora trains on one device, got {len(devices)}; set trainer.devices: 1 (or [index] to choose one)")
        self._parallel_devices = devices
        if devices:
            self._root_device = devices[0]
