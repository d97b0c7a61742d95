"""Where a resumed fit goes on: Lightning's progress, rewritten from the one number that counts, the optimizer steps taken.

Lightning saves how many microbatches and epochs it has begun. That is wrong for us in three cases: an epoch that max_steps or a time limit
cut short is saved as complete, another ``accumulate_grad_batches`` counts other microbatches, and a validation may fall inside a step.
The data's plan is made of whole optimizer steps, so epoch, place in it and microbatches follow from the step and the plan.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.console import say
from qlora_lightning.manifest import check_manifest, different_environment, environment, fit_manifest
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.checkpoint_io import load_whole


class Resume(Callback):
    """Set a checkpoint right before Lightning reads its progress.

    A checkpoint that is damaged or another run's is refused before the model loads.
    """

    def __init__(self) -> None:
        self.checkpoint: Path | None = None
        """What the fit goes on from; set before the Trainer runs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """With the data read. The module compares once more what it has loaded."""
        if stage != "fit" or self.checkpoint is None:
            return
        assert isinstance(pl_module, QLoRAModule)
        saved = load_whole(self.checkpoint, lazily=True)["qlora_lightning"]
        if "manifest" in saved:
            check_manifest(saved["manifest"], fit_manifest(pl_module, trainer), str(self.checkpoint))
            if line := different_environment(saved["environment"], environment(trainer.strategy.root_device)):
                say(line)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        align_progress(checkpoint, data.steps_per_epoch, data.microbatches_per_epoch, trainer.accumulate_grad_batches)
        trainer.num_sanity_val_steps = 0  # its held-out loss would pass for that of the untrained model


def align_progress(checkpoint: dict[str, Any], steps_per_epoch: int, microbatches_per_epoch: int, accumulate: int) -> None:
    """Rewrite the fit loop's progress in ``checkpoint`` as that of a run which has just ended optimizer step ``global_step``."""
    epoch, step = divmod(checkpoint["global_step"], steps_per_epoch)
    loop = checkpoint["loops"]["fit_loop"]
    begun = epoch + (step > 0)
    for count in loop["epoch_progress"].values():
        count.update(ready=begun, started=begun, processed=epoch, completed=epoch)
    done = step * accumulate
    batches = loop["epoch_loop.batch_progress"]
    batches["current"].update(ready=done, started=done, processed=done, completed=done)
    done += epoch * microbatches_per_epoch
    batches["total"].update(ready=done, started=done, processed=done, completed=done)
    batches["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
    checkpoint["epoch"] = epoch
