"""When validation runs, in optimizer steps: Lightning counts microbatches, so that its interval changes with the accumulation."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.errors import UserError

NEVER = 10**9
"""More microbatches than any epoch has."""


class ValidateEvery(Callback):
    """Validate every n optimizer steps, and after the last.

    Args:
        every_n_steps: Optimizer steps between validations, counted from the start of the run; unset: at the end of each epoch and of the
            run. trainer.val_check_interval, where it is set, takes the place of both.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"validation.every_n_steps must be 1 or more, got {every_n_steps}; leave it out to validate at the end of each epoch"
            )
        self.every_n_steps = every_n_steps
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._decides(trainer):
            trainer.val_check_batch = NEVER

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning looks at its interval after this hook: 1 makes it validate now."""
        if self._decides(trainer):
            trainer.val_check_batch = 1 if trainer.global_step != self._step and self._due(trainer) else NEVER
        self._step = trainer.global_step

    def _decides(self, trainer: Trainer) -> bool:
        return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def _due(self, trainer: Trainer) -> bool:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.global_step >= data.total_steps > 0 or trainer.should_stop:
            return True
        return trainer.global_step % (self.every_n_steps or data.steps_per_epoch) == 0
