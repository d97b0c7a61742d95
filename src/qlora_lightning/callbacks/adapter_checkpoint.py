"""Checkpoints to resume from, each beside a PEFT adapter folder to use: ``last``, ``best`` and every n steps."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qlora_lightning.card import adapter_card
from qlora_lightning.errors import UserError
from qlora_lightning.loggers import RunWandbLogger
from qlora_lightning.modeling.adapters import save_adapter
from qlora_lightning.module import QLoRAModule

FOLDER = "checkpoints"


class AdapterCheckpoint(Checkpoint):
    """Write ``checkpoints/last.ckpt``, ``best.ckpt`` and ``step-<n>.ckpt`` of a run folder, each with an adapter folder of that name.

    Args:
        every_n_steps: Optimizer steps between saves; the end of the run is always saved.
        keep: How many step-<n> checkpoints to keep, the newest; 0 for none beside last and best.
        monitor: Metric whose lowest value after a validation makes ``best``.
    """

    def __init__(self, every_n_steps: int = 250, keep: int = 2, monitor: str = "val/loss") -> None:
        if every_n_steps < 1 or keep < 0:
            raise UserError(f"checkpoint.every_n_steps must be 1 or more and checkpoint.keep 0 or more, got {every_n_steps} and {keep}")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.monitor = monitor
        self.best = math.inf
        self._saved_step = 0
        self._due = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note that this step is to be saved: a moment later, when its metrics are logged and its validation, if any, has run."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step >= data.total_steps > 0 or trainer.should_stop
        self._due = self._due or (due and step != self._saved_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise UserError(f"checkpoint.monitor {self.monitor} is not logged; logged are {', '.join(sorted(trainer.callback_metrics))}")
        if trainer.sanity_checking:
            return
        if float(value) < self.best:
            self.best = float(value)
            self._save(trainer, "best")
        self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_due(trainer)  # before any other callback's on_train_end can fail

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.upload_adapter(run_checkpoints(trainer) / "last", {"step": trainer.global_step})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the run is told to stop: Lightning heeds SIGTERM between batches, so that the last update is whole."""
        if isinstance(exception, SIGTERMException) and trainer.global_step != self._saved_step:
            self._save_step(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._due:
            self._due = False
            self._save_step(trainer)

    def _save_step(self, trainer: Trainer) -> None:
        """Save ``last`` and, where they are kept, ``step-<n>`` as the same file under another name."""
        self._saved_step = trainer.global_step
        self._save(trainer, "last")
        if self.keep:
            last, step = (run_checkpoints(trainer) / name for name in ("last", f"step-{trainer.global_step:08d}"))
            _link(last.with_suffix(".ckpt"), step.with_suffix(".ckpt"))
            shutil.copytree(last, step, dirs_exist_ok=True)
            self._remove_old(trainer)

    def _save(self, trainer: Trainer, name: str) -> None:
        """Write the adapter folder first: a checkpoint whose name is there has its adapter beside it."""
        folder = run_checkpoints(trainer) / name
        module = trainer.lightning_module
        assert isinstance(module, QLoRAModule)
        if trainer.is_global_zero:
            self._save_adapter(trainer, module, folder)
        trainer.save_checkpoint(folder.with_suffix(".ckpt"))

    def _save_adapter(self, trainer: Trainer, module: QLoRAModule, folder: Path) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        metadata = module.metadata() | trainer.datamodule.metadata() | {"step": trainer.global_step, "metrics": metrics}  # type: ignore[attr-defined]
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        save_adapter(module.model, beside, metadata, adapter_card(metadata, folder))
        trainer.datamodule.tokenizer.save_pretrained(beside)  # type: ignore[attr-defined]
        config = Path(trainer.default_root_dir, "config.yaml")
        if config.is_file():
            shutil.copy(config, beside / "recipe.yaml")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)

    def _remove_old(self, trainer: Trainer) -> None:
        for old in sorted(run_checkpoints(trainer).glob("step-*.ckpt"))[: -self.keep]:
            old.unlink()
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)


def run_checkpoints(trainer: Trainer) -> Path:
    """The folder of a run's checkpoints."""
    return Path(trainer.default_root_dir, FOLDER)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
