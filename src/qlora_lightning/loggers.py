"""Where metrics go: a CSV file that survives a resume, and Weights & Biases, which may never break, block or prompt in a run.

Lightning's CSV logger deletes an existing ``metrics.csv``; ours continues it. Lightning's W&B logger needs a key, a network and an
answer to a prompt; ours decides from what it finds whether to record online or to a local folder.
"""

import csv
import os
import secrets
import socket
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from qlora_lightning.console import say
from qlora_lightning.errors import UserError

WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun")
HOST_SECONDS = 3.0
"""How long to look for the W&B server before recording offline."""


class RunCSVLogger(Logger):
    """One row a logging call in ``<save_dir>/metrics.csv``, written at once; an existing file is continued, not deleted.

    Args:
        save_dir: Folder of the run. The file lies directly in it, without a version folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self._columns: list[str] | None = None

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return self._save_dir

    @property
    def name(self) -> str:
        """Empty, as is the version: the run folder names the run, and a resumed run is the same one."""
        return ""

    version = name

    @property
    def path(self) -> Path:
        """The file of metrics."""
        return Path(self._save_dir) / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the command line writes the whole configuration to ``config.yaml``; a second, partial copy would only differ."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row. ``step`` is the optimizer step, counted from 0; a name not seen before adds a column."""
        numbers = {name: str(value.item() if isinstance(value, Tensor) else value) for name, value in metrics.items()}
        row = {"step": "" if step is None else str(step), **numbers}
        columns = self._read_columns()
        new = [name for name in row if name not in columns]
        if new:
            self._columns = [*columns, *new]
            self._rewrite(self._read_rows())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._read_columns(), lineterminator="\n").writerow(row)

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop the rows of optimizer steps >= ``step``, which a run resumed at ``global_step == step`` will log again.

        Call it at the start of every fit: with 0 it empties the file of an earlier run in the same folder.
        """
        if self.path.is_file():
            self._read_columns()
            self._rewrite([row for row in self._read_rows() if not row["step"] or int(row["step"]) < step])

    def _read_columns(self) -> list[str]:
        """Header of the file, read once; the first call makes the folder and drops a line that a kill cut short."""
        if self._columns is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self._draft().write_text(whole, encoding="utf-8")
                self._draft().replace(self.path)
            self._columns = next(csv.reader(whole.splitlines()[:1]), [])
        return self._columns

    def _read_rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Header and ``rows`` in place of the old file."""
        draft = self._draft()
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._read_columns(), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(self.path)

    def _draft(self) -> Path:
        """A file beside the real one, put in its place whole, so that a kill never leaves half a history."""
        return self.path.with_suffix(".csv.tmp")


class WandbMode(NamedTuple):
    """How W&B records, and why: ``mode`` is online, offline, disabled or what WANDB_MODE says."""

    mode: str
    reason: str


def wandb_mode(seconds: float = HOST_SECONDS) -> WandbMode:
    """Decide how to record, before W&B starts: a wish of the user wins, then no key or no server mean offline. Never prompts.

    Raises:
        UserError: WANDB_MODE holds a word that W&B does not know.
    """
    if (word := os.environ.get("WANDB_MODE", "online")) not in WANDB_MODES:
        raise UserError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, got {word!r}; unset it to let the run decide")
    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    stored = None if settings.mode == "online" else settings.mode  # `wandb offline` stores one; online is only the default, no wish
    if wish := os.environ.get("WANDB_MODE") or stored:
        return WandbMode("offline" if wish == "dryrun" else wish, "WANDB_MODE or W&B settings")
    if not wandb_logged_in():
        return WandbMode("offline", "no API key; `wandb login` stores one")
    if not reachable(settings.base_url, seconds):
        return WandbMode("offline", f"{settings.base_url} not reachable within {seconds:g} s")
    return WandbMode("online", "API key found and server reachable")


def wandb_logged_in() -> bool:
    """Whether W&B finds a key (environment, settings, netrc), without a prompt and without asking the server."""
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:  # a malformed key is as good as none
        return False


def reachable(url: str, seconds: float) -> bool:
    """Whether the host of ``url``, or the proxy set for it, accepts a connection within ``seconds``."""
    parts = urlsplit(url)
    if (proxy := urllib.request.getproxies().get(parts.scheme)) and not urllib.request.proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    answers: list[bool] = []
    # A thread, because the timeout of a socket does not bound the name look-up before it.
    attempt = threading.Thread(target=lambda: answers.append(_connects(address, seconds)), daemon=True)
    attempt.start()
    attempt.join(seconds)
    return bool(answers and answers[0])


def _connects(address: tuple[str, int], seconds: float) -> bool:
    try:
        socket.create_connection(address, timeout=seconds).close()
    except OSError:
        return False
    return True


class RunWandbLogger(WandbLogger):
    """Record the run with Weights & Biases: online when a key and the server are there, else in a local folder to upload later.

    WANDB_MODE (online, offline, disabled) decides alone when set. If W&B fails, the run goes on without it. A resumed fit continues the
    same W&B run: set ``resume`` before the first use. Metrics have the optimizer step ``trainer/global_step`` as x-axis.

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
        super().__init__(name=name, save_dir=save_dir or ".", id=id, project=project, entity=entity, tags=tags)
        self._wandb_init.pop("anonymous")  # W&B warns about the argument whatever its value
        self.log_adapter = log_adapter
        self.resume = False
        self._mode = WandbMode("disabled", "not started")

    @property
    def id_path(self) -> Path:
        """File that keeps the run's identity for a resumed fit."""
        return Path(self._wandb_init["dir"]) / "wandb" / "run-id.txt"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at first use; a run that records nothing when W&B fails to start."""
        if self._experiment is None:
            self._attempt(self._start)
        return self._experiment

    def _start(self) -> None:
        self._mode = wandb_mode()
        self._wandb_init["id"] = self._id = self._id or self._choose_id()
        self._wandb_init["mode"] = self._mode.mode
        self._wandb_init["settings"] = wandb.Settings(silent=True, console="off", init_timeout=30, login_timeout=30, finish_timeout=300)
        self.id_path.parent.mkdir(parents=True, exist_ok=True)
        run: Any = super().experiment
        self.id_path.write_text(self._id + "\n", encoding="utf-8")
        if self._mode.mode == "online":
            say(f"W&B: {run.url}")

    def _choose_id(self) -> str:
        """The stored identity when resuming; else the one a sweep gives through the environment, else a new one."""
        if self.resume and self.id_path.is_file():
            return self.id_path.read_text(encoding="utf-8").strip()
        return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Run ``action``; on any failure say so once and go on with a W&B run that records nothing."""
        try:
            action()
        except Exception as error:
            self._mode = WandbMode("disabled", "W&B failed")
            self._experiment = wandb.init(mode="disabled", settings=wandb.Settings(silent=True))
            say(f"warning: W&B failed and the run goes on without it ({type(error).__name__}: {error})")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Store ``params`` as the configuration of the W&B run."""
        self._attempt(lambda: super(RunWandbLogger, self).log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send ``metrics`` of the optimizer step ``step``."""
        self._attempt(lambda: super(RunWandbLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def upload_adapter(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Make the adapter in ``folder`` an artifact of type "model"; nothing unless ``log_adapter`` is set."""
        if self.log_adapter:
            self._attempt(lambda: self._upload(folder, metadata))

    def _upload(self, folder: Path, metadata: dict[str, Any]) -> None:
        run = self.experiment
        if self._mode.mode == "disabled":
            return
        artifact = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=metadata)
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the W&B run as finished or failed; offline, say how to upload it. A later use continues the same run."""
        if self._experiment is None:
            return
        run, self._experiment = self._experiment, None
        self._attempt(lambda: self._finish(run, 0 if status == "success" else 1))
        self._experiment = None

    def _finish(self, run: Any, exit_code: int) -> None:
        if self._mode.mode != "offline":
            run.finish(exit_code)
            return
        record = Path(run.settings.sync_file)
        size_before_bytes = record.stat().st_size
        run.finish(exit_code)
        _wait_until_written(record, size_before_bytes, seconds=10.0)
        say(f"W&B recorded offline ({self._mode.reason}); upload with: wandb sync {record.parent}")


def _wait_until_written(file: Path, size_bytes: int, seconds: float) -> None:
    """W&B still writes an offline run after ``finish`` returns, and an exit right then has been seen to lose it: wait until the file
    is larger than ``size_bytes`` and has not grown for half a second."""
    give_up = time.monotonic() + seconds
    before, still_since = size_bytes, time.monotonic()
    while time.monotonic() < give_up and (before == size_bytes or time.monotonic() - still_since < 0.5):
        time.sleep(0.05)
        if (now := file.stat().st_size) != before:
            before, still_since = now, time.monotonic()
