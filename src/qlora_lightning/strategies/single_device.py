"""``strategy: qlora``: one device, a 4-bit base that is never moved, and optimizer state that stays paged after a resume."""

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from qlora_lightning.errors import UserError
from qlora_lightning.strategies.paged import PagedStrategy


class QLoRAStrategy(PagedStrategy, SingleDeviceStrategy):
    """Train on one device under a memory policy."""

    strategy_name = "qlora"
    _parallel_devices: list[torch.device] | None = None

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
