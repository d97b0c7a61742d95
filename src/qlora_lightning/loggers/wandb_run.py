"""The run in Weights & Biases, which may never break, block or prompt, and which has each row of ``metrics.csv`` once after a resume."""

import os
import secrets
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from qlora_lightning.console import say
from qlora_lightning.loggers.csv_rows import RunCSVLogger
from qlora_lightning.loggers.wandb_files import mark_replaced, rows_uploaded
from qlora_lightning.loggers.wandb_mode import WandbMode, wandb_mode
from qlora_lightning.redaction import redacted, redacted_values

START_SECONDS, CALL_SECONDS, FINISH_SECONDS = 90.0, 30.0, 60.0
"""How long a run waits for W&B: to start, to take something in, and to upload the rest at the end. After that it goes on without."""
UPLOAD_SECONDS = 1800.0
"""How long it waits at the end where the adapter is to be uploaded too."""
ROW = "trainer/row"
"""Number of a row in ``metrics.csv``, from 0, by which a resumed run knows what W&B has."""


class RunWandbLogger(WandbLogger):
    """Record the run with Weights & Biases: online when a key and the server are there, else in a local folder to upload later.

    WANDB_MODE (online, offline, disabled) decides alone when set. If W&B fails or hangs, the run goes on without it. A resumed fit
    continues the same W&B run: set ``resume`` and ``history`` before the first use. Metrics have the optimizer step
    ``trainer/global_step`` as x-axis.

    Args:
        project: W&B project that the run belongs to.
        name: Display name of the run; W&B invents one when left out.
        entity: W&B user or team; the default one of the account when left out.
        save_dir: Folder for W&B's files, ``wandb/`` inside it; the working folder when left out.
        log_adapter: Upload the trained adapter as an artifact of type "model".
        tags: Words to find the run by.
        id: Identity of the run; the same one continues a run. Left out: a new one, or the stored one when resuming.
    """

    def __init__(
        self,
        project: str = "qlora-lightning",
        name: str | None = None,
        entity: str | None = None,
        save_dir: str | None = None,
        log_adapter: bool = False,
        tags: list[str] | None = None,
        id: str | None = None,
    ) -> None:
        name, tags = redacted_values([name, tags])
        super().__init__(name=name, save_dir=save_dir or ".", id=id, project=project, entity=entity, tags=tags)
        self._wandb_init.pop("anonymous")  # W&B warns about the argument whatever its value
        self.log_adapter = log_adapter
        self.resume = False
        self.history: RunCSVLogger | None = None
        """The rows that W&B is to have, logged there before they are logged here."""
        self._recorded: int | None = None
        self._mode = WandbMode("disabled", "not started")

    @property
    def id_path(self) -> Path:
        """File that keeps the run's identity for a resumed fit."""
        return Path(self._wandb_init["dir"]) / "wandb" / "run-id.txt"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at first use; one that records nothing when W&B fails to start."""
        if self._experiment is None:
            self._attempt(self._start, START_SECONDS)
        return self._experiment

    def _start(self) -> None:
        self._mode = wandb_mode()
        self._wandb_init["id"] = self._id = self._id or self._choose_id()
        self._wandb_init["mode"] = self._mode.mode
        self._wandb_init["settings"] = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=30,
            login_timeout=30,
            finish_timeout=self._finish_seconds,
            finish_timeout_raises=True,
            x_disable_meta=any(redacted(argument) != argument for argument in sys.argv),  # it would hold the command line
        )
        self.id_path.parent.mkdir(parents=True, exist_ok=True)
        run: Any = super().experiment
        self.id_path.write_text(self._id + "\n", encoding="utf-8")
        if self.history is not None:
            run.define_metric(ROW, hidden=True)
        if self._mode.mode == "online":
            say(f"W&B: {run.url}")

    @property
    def _finish_seconds(self) -> float:
        return UPLOAD_SECONDS if self.log_adapter else FINISH_SECONDS

    def _choose_id(self) -> str:
        """The stored identity when resuming; else the one a sweep gives through the environment, else a new one."""
        if self.resume and self.id_path.is_file():
            return self.id_path.read_text(encoding="utf-8").strip()
        return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)

    def _attempt(self, action: Callable[[], Any], seconds: float | None = None) -> None:
        """Run ``action``; when it fails, or has not ended after ``seconds``, say so once and go on with a run that records nothing."""
        seconds = CALL_SECONDS if seconds is None else seconds
        failures: list[Exception] = []

        def work() -> None:
            try:
                action()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)  # what hangs must not keep the process alive
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self._give_up(f"no answer within {seconds:g} s")
        elif failures:
            self._give_up(f"{type(failures[0]).__name__}: {failures[0]}")

    def _give_up(self, reason: str) -> None:
        self._mode = WandbMode("disabled", "W&B failed")
        self._experiment = _Nothing()  # type: ignore[assignment]
        say(f"warning: W&B failed and the run goes on without it ({reason})")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Store ``params`` as the configuration of the W&B run, without secrets."""
        harmless = redacted_values(params if isinstance(params, dict) else vars(params))
        if self._starts():
            self._attempt(lambda: super(RunWandbLogger, self).log_hyperparams(harmless))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send ``metrics`` of the optimizer step ``step``, unless W&B has them from before a resume."""
        if self._starts():
            self._attempt(lambda: self._log(metrics, step))

    def _starts(self) -> bool:
        """Whether there is a W&B run that records, started here if need be."""
        return not isinstance(self.experiment, _Nothing)

    def _log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        if self.history is None:
            super().log_metrics(metrics, step)
            return
        is_row = not any(isinstance(value, wandb.Table) for value in metrics.values())
        row = self.history.rows - is_row  # ``history`` has this very row already
        self._catch_up(row)
        assert self._recorded is not None
        if row < self._recorded:
            return
        if is_row:
            self._recorded = row + 1
        super().log_metrics({**metrics, ROW: row} if is_row else metrics, step)

    def _catch_up(self, end: int) -> None:
        """Send the rows before ``end`` that W&B does not have: lost with a killed process, or recorded by one without a network."""
        assert self.history is not None
        if self._recorded is None:
            self._recorded = self._rows_there() if self.resume else 0
        missing = self.history.read_rows()[self._recorded : end] if self._recorded < end else []
        for row, texts in enumerate(missing, self._recorded):
            numbers = {name: _number(text) for name, text in texts.items() if text and name != "step"}
            super().log_metrics({**numbers, ROW: row}, int(texts["step"]) if texts["step"] else None)
        self._recorded = max(self._recorded, end)

    def _rows_there(self) -> int:
        """How many rows of this run W&B has from before: the server says it, or the folders that were uploaded."""
        run = self.experiment
        folder, offline = self.id_path.parent, self._mode.mode == "offline"
        there = rows_uploaded(folder, run.id, ROW) if offline else int(run.summary.get(ROW, -1)) + 1
        mark_replaced(folder, run.id, by=Path(run.settings.sync_dir))
        return there

    @rank_zero_only
    def upload_adapter(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Make the adapter in ``folder`` an artifact of type "model"; nothing unless ``log_adapter`` is set."""
        if self.log_adapter and self._starts():
            self._attempt(lambda: self._upload(folder, metadata), UPLOAD_SECONDS)

    def _upload(self, folder: Path, metadata: dict[str, Any]) -> None:
        run = self.experiment
        if self._mode.mode == "disabled":
            return
        artifact = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=redacted_values(metadata))
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the W&B run as finished or failed; offline, say how to upload it. A later use continues the same run."""
        if self._experiment is None or isinstance(self._experiment, _Nothing):
            return
        if self.history is not None:
            self._attempt(lambda: self._catch_up(self.history.rows))  # type: ignore[union-attr]
        run = self._experiment
        self._attempt(lambda: self._finish(run, 0 if status == "success" else 1), self._finish_seconds + CALL_SECONDS)
        self._experiment = self._recorded = None

    def _finish(self, run: Any, exit_code: int) -> None:
        if self._mode.mode != "offline":
            try:
                run.finish(exit_code)
            except TimeoutError:
                say(
                    f"warning: W&B has not taken everything within {self._finish_seconds:g} s; nothing is lost ({run.settings.sync_dir}): "
                    "when the server answers again, the same command with --ckpt_path last uploads the rows that it lacks"
                )
            return
        record = Path(run.settings.sync_file)
        size_before_bytes = record.stat().st_size
        run.finish(exit_code)
        _wait_until_written(record, size_before_bytes, seconds=10.0)
        say(f"W&B recorded offline ({self._mode.reason}); upload with: wandb sync {record.parent}")


class _Nothing:
    """In place of a W&B run that failed: takes every call and does nothing, whatever state W&B is in."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def _number(text: str) -> float:
    """A value as it was logged: whole numbers stay whole."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _wait_until_written(file: Path, size_bytes: int, seconds: float) -> None:
    """W&B still writes an offline run after ``finish`` returns, and an exit right then has been seen to lose it: wait until the file
    is larger than ``size_bytes`` and has not grown for half a second."""
    give_up = time.monotonic() + seconds
    before, still_since = size_bytes, time.monotonic()
    while time.monotonic() < give_up and (before == size_bytes or time.monotonic() - still_since < 0.5):
        time.sleep(0.05)
        if (now := file.stat().st_size) != before:
            before, still_since = now, time.monotonic()
