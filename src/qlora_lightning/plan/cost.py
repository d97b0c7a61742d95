"""What a run costs beside memory: seconds, where the device's rate is known, and disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.fused.foresight import FusedShape
from qlora_lightning.plan.longest import Ahead
from qlora_lightning.plan.memory import MemoryPlan

PRODUCTS = {"NVIDIA H200": 650e12, "NVIDIA H100 80GB HBM3": 650e12}
"""Name of a GPU -> floating-point operations a second of bf16 products, measured on an H200 (benchmarks/2026-11-23-fused-7b-h200.md); an
H100 SXM is the same chip."""
# Of the same measurement: the products' share of the time that grows with tokens, 4-bit weights dequantised a second, values updated.
_SHARE, _DEQUANTISED, _UPDATED = 0.8, 1.4e12, 32e9


@dataclass(frozen=True)
class Disk:
    """What the checkpoints of a run take."""

    folder: Path
    """Of the run."""
    checkpoint: int
    """Bytes of one to resume from: adapter and optimizer's state."""
    adapter: int
    """Bytes of the adapter folder beside it."""
    count: int
    """Pairs of them that there are at most, with the one that is being written."""
    free: int
    """Bytes, now."""

    @property
    def total(self) -> int:
        """Bytes at most."""
        return (self.checkpoint + self.adapter) * self.count


def disk_of(folder: Path, every: int, keep: int, trainer: Trainer, data: InstructionDataModule, plan: MemoryPlan) -> Disk:
    """Count a run's checkpoints: ``last`` and the newest ``step-<n>`` are the same files under two names.

    Args:
        folder: of the run; it need not exist.
        every: optimizer steps between checkpoints.
        keep: how many of ``step-<n>`` are kept.
        trainer: of the run.
        data: set up.
        plan: says how large adapter and state are.
    """
    kept = min(keep, -(-data.total_steps // every))
    best = int(data.val_set is not None and trainer.limit_val_batches != 0)
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    adapter = plan.trained * 4
    return Disk(folder, adapter + plan.state, adapter, max(kept, 1) + best + 1, shutil.disk_usage(there).free)


def estimated_seconds(plan: MemoryPlan, fused: FusedShape | str, ahead: Ahead, fp8: bool) -> float | None:
    """About how long the steps of a run take; None where no rate is known: only the fused path's bf16 was measured.

    Every microbatch counts as if it repeated what the longest has to, so that a run within little memory ends sooner.

    Args:
        plan: of the device.
        fused: sizes, or why the fused path is not taken.
        ahead: what is to be computed.
        fp8: whether products are computed in FP8.
    """
    rate = PRODUCTS.get(plan.target.name)
    if rate is None or isinstance(fused, str) or fp8:
        return None
    block, length = fused.block, ahead.longest.width
    attention = 7.0 * block.query * length  # forward and backward, of which half the pairs are masked
    repeated = sum(block.recomputed_flops(rung, length) for rung in plan.step.rungs)
    head = 4.0 * fused.vocabulary * block.hidden * ahead.supervised / ahead.tokens
    each = 4.0 * plan.linear + fused.layers * attention + repeated + head
    passes = 2 + repeated / (2.0 * plan.linear)
    products = ahead.computed * each / rate / _SHARE
    return products + ahead.microbatches * passes * plan.linear / _DEQUANTISED + ahead.steps * plan.trained / _UPDATED
