"""Gradient checkpointing by mode: what a block keeps for backward, and what it computes again."""

from typing import Any

from peft import PeftModel

from qlora_lightning.strategies.policy import GradientCheckpointing


def apply_gradient_checkpointing(model: PeftModel, mode: GradientCheckpointing) -> None:
    """Set ``model``'s blocks to ``mode``. Never re-entrant: that kind needs inputs with gradients, which a frozen base does not give."""
    base: Any = model.get_base_model()
    if mode != "none":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
