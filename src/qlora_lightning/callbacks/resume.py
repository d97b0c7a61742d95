"""Where a resumed fit goes on: Lightning's progress, rewritten from the one number that counts, the optimizer steps taken.

Lightning saves how many microbatches and epochs it has begun. That is wrong for us in three cases: an epoch that max_steps or a time limit
cut short is saved as complete, another ``accumulate_grad_batches`` counts other microbatches, and a validation may fall inside a step.
The data's plan is made of whole optimizer steps, so epoch, place in it and microbatches follow from the step and the plan.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.loggers import RunCSVLogger


class Resume(Callback):
    """Set a checkpoint right before Lightning reads its progress, and drop the metrics that will be logged again."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        align_progress(checkpoint, data.steps_per_epoch, data.microbatches_per_epoch, trainer.accumulate_grad_batches)
        trainer.num_sanity_val_steps = 0  # its held-out loss would pass for that of the untrained model
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.truncate_after(checkpoint["global_step"])


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
