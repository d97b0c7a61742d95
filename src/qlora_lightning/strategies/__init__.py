"""Lightning strategies by name; importing this package registers them."""

from lightning.pytorch.strategies import StrategyRegistry

from qlora_lightning.strategies.policy import MemoryPolicy
from qlora_lightning.strategies.single_device import QLoRAStrategy

if QLoRAStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(QLoRAStrategy.strategy_name, QLoRAStrategy, description="QLoRA on one device")

__all__ = ["MemoryPolicy", "QLoRAStrategy"]
