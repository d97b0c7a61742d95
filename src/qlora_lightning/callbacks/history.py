"""Which rows of ``metrics.csv`` a checkpoint has seen: those after it are logged again by the run that goes on from there."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.loggers import RunCSVLogger


class History(Callback):
    """Keep the number of rows in each checkpoint, and cut the file to it when a run goes on.

    Steps would not do: held-out loss and other evaluations of a step are rows of their own, before or after a save.
    """

    def __init__(self) -> None:
        self._rows: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in _of(trainer):
            checkpoint["metrics_rows"] = logger.rows

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._rows = checkpoint.get("metrics_rows")  # a fit that logs nothing writes none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When nothing can fail any more that would cost rows for nothing, and the folder is no longer an earlier run's."""
        for logger in _of(trainer):
            if self._rows is not None:
                logger.cut(self._rows)


def _of(trainer: Trainer) -> list[RunCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)] if trainer.is_global_zero else []
