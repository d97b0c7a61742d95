"""Lightning strategies by name; importing this package registers them."""

from lightning.pytorch.strategies import StrategyRegistry

from qlora_lightning.strategies.ddp import QLoRADDPStrategy
from qlora_lightning.strategies.fsdp2 import QLoRAFSDP2Strategy
from qlora_lightning.strategies.paged import PagedStrategy
from qlora_lightning.strategies.policy import MemoryPolicy
from qlora_lightning.strategies.single_device import QLoRAStrategy

for _strategy, _description in (
    (QLoRAStrategy, "QLoRA on one device"),
    (QLoRADDPStrategy, "QLoRA on several devices, a base on each"),
    (QLoRAFSDP2Strategy, "QLoRA on several devices, which divide the base among them"),
):
    if _strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(_strategy.strategy_name, _strategy, description=_description)

__all__ = ["MemoryPolicy", "PagedStrategy", "QLoRADDPStrategy", "QLoRAFSDP2Strategy", "QLoRAStrategy"]
