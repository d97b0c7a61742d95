"""A fit that is told to stop ends its optimizer step, is saved, and only then ends.

Lightning heeds SIGTERM between microbatches, where half a step is lost and dropout's random stream has moved on, and not Ctrl-C at all; on
SLURM it writes a checkpoint of its own from inside the signal's handler, in the middle of whatever is going on. The handlers here take the
place of all three.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.adapter_checkpoint import run_checkpoints
from qlora_lightning.interruption import Interrupted, end_now

ASKED = b"Stopping when this step has ended, or at once in a validation; Ctrl-C ends without saving\n"


class StopBetweenSteps(Callback):
    """Heed Ctrl-C, SIGTERM and SLURM's requeue signal where a checkpoint is whole: between two optimizer steps, and in a validation.

    A validation that is cut short runs again, from its first batch, when the run goes on.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._job: str | None = None
        self._requeue_signal: int | None = None
        self._step = 0
        self._begun = False
        self._between = True  # no microbatch of the next step has run
        self._validation_due = False

    def state_dict(self) -> dict[str, bool]:
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self._validation_due = state_dict["validation_due"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the requeue signal: Lightning leaves one alone that has a handler already. Let a finished run end its validation."""
        self._begun = True
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            self._requeue_signal, self._job = int(environment.requeue_signal), slurm_job()
            self._handle(self._requeue_signal)
        if self._validation_due:
            _move_end(trainer, 1)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals()
        self._step = trainer.global_step
        if self._validation_due:
            _move_end(trainer, -1)
            self._validation_due = False
            with _at_step_before(trainer):
                _validate(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """By now the metrics of the step before are logged, and its validation, if any, has run."""
        self._stop_if_asked(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._between = trainer.global_step != self._step
        self._step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_in_validation(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop_in_validation(trainer)

    def _stop_in_validation(self, trainer: Trainer) -> None:
        if trainer.state.fn == "fit":
            self._validation_due = self._asked is not None and self._between and not trainer.sanity_checking
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._asked is not None and self._between:
            asked, self._asked = self._asked, None
            job = self._job if asked == self._requeue_signal and trainer.is_global_zero else None
            raise Interrupted(asked, step=trainer.global_step, job=job)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell where the checkpoint is, which is written after this."""
        if isinstance(exception, Interrupted) and self._begun:
            exception.checkpoint = run_checkpoints(trainer) / "last.ckpt"

    def _take_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handle(number)

    def _handle(self, number: int) -> None:
        if threading.current_thread() is threading.main_thread():  # the only one that may
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Keep the wish. A Ctrl-C after it ends the run at once; schedulers are known to repeat the other signals."""
        if signal.getsignal(signal.SIGINT) == self._ask:
            signal.signal(signal.SIGINT, end_now)
        if self._asked is None:
            self._asked = number
            os.write(2, ASKED)  # not through the console, which the signal may have interrupted in the middle of a write


def slurm_job() -> str:
    """What ``scontrol requeue`` calls this job: its number, or array and task."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _validate(trainer: Trainer) -> None:
    """Run the validation that follows a step, as Lightning's loop does it."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


@contextmanager
def _at_step_before(trainer: Trainer) -> Iterator[None]:
    """What is logged within this has the step and the epoch of the optimizer step that the checkpoint ends with."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    epoch: Any = trainer.fit_loop.epoch_progress.current
    epoch_ended = int(trainer.global_step % data.steps_per_epoch == 0)
    trainer.fit_loop.epoch_loop._batches_that_stepped -= 1
    epoch.processed, epoch.completed = epoch.processed - epoch_ended, epoch.completed - epoch_ended
    try:
        yield
    finally:
        trainer.fit_loop.epoch_loop._batches_that_stepped += 1
        epoch.processed, epoch.completed = epoch.processed + epoch_ended, epoch.completed + epoch_ended


def _move_end(trainer: Trainer, by: int) -> None:
    """Lightning does not even begin a fit that has no step left; with its end moved it does."""
    loop = trainer.fit_loop
    if loop.max_steps != -1:
        loop.epoch_loop.max_steps += by
    if loop.max_epochs not in (None, -1):
        loop.max_epochs += by
