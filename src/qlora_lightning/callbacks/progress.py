"""Progress in optimizer steps: a live bar on a terminal, a plain line now and then in a log file.

Lightning's bars count microbatches, start anew each epoch and read metrics from the device every batch. Here one unit is one optimizer
step, a resumed run starts at its step, and metrics are read (which waits for the device) at most twice a second.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text
from torch import Tensor
from torch.optim import Optimizer

from qlora_lightning.callbacks.pace import Pace
from qlora_lightning.console import console, is_live, say

READ_SECONDS = 0.5
"""Shortest time between two readings of metrics for a terminal."""


class Reading(NamedTuple):
    """The values beside the count; a metric that nobody has logged yet is None."""

    loss: float | None
    lr: float | None
    tokens_per_second: float | None

    def __str__(self) -> str:
        parts = [
            "" if self.loss is None else f"loss {self.loss:.4f}",
            "" if self.lr is None else f"lr {self.lr:.1e}".replace("e-0", "e-"),
            "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s",
        ]
        return "  ".join(part for part in parts if part)


class _TimeColumn(ProgressColumn):
    """Time of the session and time left, from the task's ``pace``; it goes on between steps."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"].times(time.monotonic()), style="cyan")


class RunProgress(ProgressBar):
    """Progress of a run on standard error, in optimizer steps.

    Args:
        every_n_steps: Without a terminal, print a line after so many steps ...
        every_n_seconds: ... or after so many seconds, whichever comes first.
    """

    def __init__(self, every_n_steps: int = 10, every_n_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.is_enabled = True  # Lightning reads this name in ``LightningModule.print``
        self._bars: Progress | None = None
        self._train_bar: TaskID | None = None
        self._evaluation_bar: TaskID | None = None
        self._pace = self._evaluation = Pace(None, 0, 0.0)
        self._learning_rate: float | None = None
        self._read_at = self._printed_at = 0.0
        self._printed_step = 0

    def enable(self) -> None:
        """Show progress again."""
        self.is_enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning calls it on every rank but the first."""
        self.is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar; ``LightningModule.print`` ends here."""
        if self.is_enabled:
            text = io.StringIO()
            print(*args, **{**kwargs, "file": text})
            say(text.getvalue().rstrip("\n"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at the step that the checkpoint holds."""
        now = time.monotonic()
        self._pace = Pace(_whole(trainer.estimated_stepping_batches), trainer.global_step, now)
        self._read_at, self._printed_at, self._printed_step = 0.0, now, trainer.global_step
        if self._start():
            assert self._bars is not None
            self._train_bar = self._bars.add_task("step", total=self._pace.total, completed=self._pace.step, values="", pace=self._pace)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Keep the rate that this step uses; afterwards the schedule has already set the next one."""
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count, when this microbatch ended an optimizer step."""
        if not self.is_enabled or trainer.global_step == self._pace.step:
            return
        now = time.monotonic()
        self._pace.advance(trainer.global_step, now)
        if self._bars is not None:
            self._update_bar(trainer, now)
        elif self._pace.step - self._printed_step >= self.every_n_steps or now - self._printed_at >= self.every_n_seconds:
            self._print_line(trainer, now)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last step whatever the rhythm."""
        if self._bars is not None:
            self._read_at = 0.0
            self._update_bar(trainer, time.monotonic())
        elif self.is_enabled and self._pace.step != self._printed_step:
            self._print_line(trainer, time.monotonic())
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the error is shown."""
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop()

    def _update_bar(self, trainer: pl.Trainer, now: float) -> None:
        assert self._bars is not None and self._train_bar is not None
        self._bars.update(self._train_bar, completed=self._pace.step)
        if now - self._read_at >= READ_SECONDS:
            self._read_at = now
            self._bars.update(self._train_bar, values=str(self._read(trainer)))

    def _print_line(self, trainer: pl.Trainer, now: float) -> None:
        parts = [f"step {self._pace}", str(self._read(trainer)), self._pace.times(now)]
        say("  ".join(part for part in parts if part))
        self._printed_at, self._printed_step = now, self._pace.step

    def _read(self, trainer: pl.Trainer) -> Reading:
        """Metrics as numbers; this waits for the device."""
        metrics = trainer.callback_metrics
        return Reading(_value(metrics.get("train/loss")), self._learning_rate, _value(metrics.get("train/tokens_per_second")))

    def _start(self) -> bool:
        """Start the live bars where there is a terminal; whether there are any now."""
        if self._bars is None and self.is_enabled and is_live():
            self._bars = Progress(
                TextColumn("{task.description} {task.fields[pace]}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[values]}", markup=False),
                _TimeColumn(),
                console=console,
                refresh_per_second=4,
                redirect_stdout=sys.stdout.isatty(),  # a piped standard output is a command's result and stays one
            )
            self._bars.start()
        return self._bars is not None

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._train_bar = self._evaluation_bar = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a validation batch, also one of the check before training."""
        changed = self.has_dataloader_changed(dataloader_idx)
        self._count_evaluation("validation", self.total_val_batches_current_dataloader, batch_idx, changed)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a test batch."""
        changed = self.has_dataloader_changed(dataloader_idx)
        self._count_evaluation("test", self.total_test_batches_current_dataloader, batch_idx, changed)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a prediction batch."""
        changed = self.has_dataloader_changed(dataloader_idx)
        self._count_evaluation("prediction", self.total_predict_batches_current_dataloader, batch_idx, changed)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar of the evaluation away."""
        self._end_evaluation()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar of the evaluation away."""
        self._end_evaluation()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar of the evaluation away."""
        self._end_evaluation()

    def _count_evaluation(self, name: str, batches: int | float, batch_idx: int, new_loader: bool) -> None:
        """Count one batch; the first one of a loader starts the count anew."""
        now = time.monotonic()
        if new_loader:
            self._remove_evaluation_bar()
            self._evaluation = Pace(_whole(batches), 0, now)
        self._show_evaluation(name, batch_idx + 1, now)

    def _show_evaluation(self, name: str, done: int, now: float) -> None:
        self._evaluation.advance(done, now)
        if self._start():
            self._update_evaluation_bar(name)
        elif self.is_enabled and now - self._printed_at >= self.every_n_seconds:
            say(f"{name} {self._evaluation}  {self._evaluation.times(now)}")
            self._printed_at = now

    @contextmanager
    def counting(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Progress of other work that a run does, within this; yields what is to be told how much is done, of how much."""
        self._remove_evaluation_bar()
        self._evaluation = Pace(None, 0, time.monotonic())

        def tick(done: int, of: int) -> None:
            self._evaluation.total = of
            if done:
                self._show_evaluation(name, done, time.monotonic())

        try:
            yield tick
        finally:  # outside of fit no other hook gives the terminal back, not even after Ctrl-C
            self._remove_evaluation_bar()
            if self._train_bar is None:
                self._stop()

    def _update_evaluation_bar(self, name: str) -> None:
        assert self._bars is not None
        pace = self._evaluation
        if self._evaluation_bar is None:
            self._evaluation_bar = self._bars.add_task(name, total=pace.total, values="", pace=pace)
        self._bars.update(self._evaluation_bar, completed=pace.step)

    def _remove_evaluation_bar(self) -> None:
        if self._bars is not None and self._evaluation_bar is not None:
            self._bars.remove_task(self._evaluation_bar)
        self._evaluation_bar = None

    def _end_evaluation(self) -> None:
        self._remove_evaluation_bar()
        self.reset_dataloader_idx_tracker()


def _whole(count: int | float) -> int | None:
    """A number of batches or steps; None for Lightning's two ways to say that there is no end."""
    return int(count) if 0 <= count < float("inf") else None


def _value(metric: Tensor | None) -> float | None:
    return None if metric is None else float(metric)
