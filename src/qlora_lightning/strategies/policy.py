"""What a run may keep in device memory: one policy that every strategy states and the module obeys."""

from dataclasses import dataclass
from typing import Literal

from qlora_lightning.errors import check_least

GradientCheckpointing = Literal["auto", "full", "none"]


@dataclass(frozen=True)
class MemoryPolicy:
    """How a run spends device memory; what checkpointing means is decided in ``fused/memory.py``, without the fused path in
    ``modeling/checkpointing.py``."""

    paged_optimizer: bool = True
    """Keep optimizer state in unified memory, so that a spike pages it out to the host instead of failing. CUDA only."""
    optimizer_bits: Literal[32, 8] = 32
    """Bits of each of AdamW's two moments; 8 stores them block-wise quantised (bitsandbytes)."""
    gradient_checkpointing: GradientCheckpointing = "auto"
    """``full`` keeps only each block's input and computes the block again in backward; ``none`` keeps everything; ``auto`` keeps what the
    memory budget allows and computes the rest again."""
    memory_budget_gib: float | None = None
    """What the run may use in all, in GiB; None for what is free on the device when the run starts, less a margin. For ``auto`` only."""
    offload_inputs: bool = False
    """Let the inputs that blocks keep wait in pinned host memory until backward. CUDA only."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant; on its own, as the parser takes apart what a strategy raises."""
        check_least("trainer.strategy.init_args", {"memory_budget_gib": (self.memory_budget_gib, 1)})

    def describe_checkpointing(self) -> str:
        """What is kept for backward, in a few words."""
        budget = "what memory is free" if self.memory_budget_gib is None else f"{self.memory_budget_gib:g} GiB in all"
        within = f" within {budget}" if self.gradient_checkpointing == "auto" else ""
        waiting = ", kept inputs on the host" if self.offload_inputs else ""
        return f"gradient checkpointing {self.gradient_checkpointing}{within}{waiting}"
