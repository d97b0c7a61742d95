"""When validation runs, in optimizer steps: Lightning counts microbatches, so that its interval changes with the accumulation."""

from lightning.pytorch import Callback, LightningModule, Trainer


class ValidateEvery(Callback):
    """Validate every n optimizer steps of an epoch.

    Args:
        every_n_steps: Optimizer steps between validations, counted from the start of each epoch; unset: at the end of each epoch
            (or as trainer.val_check_interval says).
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the Trainer's interval, now that the length of an epoch is known."""
        if stage != "fit" or self.every_n_steps is None:
            return
        steps_per_epoch: int = trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        if self.every_n_steps < steps_per_epoch:
            trainer.val_check_interval = self.every_n_steps * trainer.accumulate_grad_batches
        else:
            trainer.check_val_every_n_epoch = max(1, round(self.every_n_steps / steps_per_epoch))
