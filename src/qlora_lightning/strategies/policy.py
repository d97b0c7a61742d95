"""What a run may keep in device memory: one policy that every strategy states and the module obeys."""

from dataclasses import dataclass
from typing import Literal

GradientCheckpointing = Literal["none", "full"]


@dataclass(frozen=True)
class MemoryPolicy:
    """How a run spends device memory.

    A checkpointing mode that keeps part of the layers is one more value of ``gradient_checkpointing``, interpreted in
    ``modeling/checkpointing.py``; nothing else has to know of it.
    """

    paged_optimizer: bool = True
    """Keep optimizer state in unified memory, so that a spike pages it out to the host instead of failing. CUDA only."""
    optimizer_bits: Literal[32, 8] = 32
    """Bits of each of AdamW's two moments; 8 stores them block-wise quantised (bitsandbytes)."""
    gradient_checkpointing: GradientCheckpointing = "full"
    """``full`` keeps only each block's input and computes the block again in backward; ``none`` keeps everything."""
