"""The folder of a run: where it is, what is in it already, and which checkpoint a run starts from."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qlora_lightning.callbacks.adapter_checkpoint import FOLDER
from qlora_lightning.callbacks.run_files import MMLU_FOLDER, NONFINITE_FILE, SAMPLES_FILE
from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.adapters import ADAPTER_FILE
from qlora_lightning.strategies.checkpoint_io import furthest_checkpoint

METRICS_FILE = "metrics.csv"
DELETED = ".deleted"
"""Ends the name of a folder of checkpoints that is being deleted."""


def named_folder(config: Namespace) -> Path:
    """``trainer.default_root_dir``, else ``runs/`` and the name of the last recipe given."""
    root = config.trainer.default_root_dir
    _, *recipes = [Path(str(file)).stem for file in config.config]  # the first are the shared defaults
    return Path(root) if root else Path("runs", recipes[-1] if recipes else "unnamed")


def run_folder(config: Namespace) -> Path:
    """``named_folder``, made where it is not there yet.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = named_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # without a name, so that a kill leaves nothing
    except OSError as error:
        raise UserError(f"run folder {folder} is not writable ({error.strerror}); set --trainer.default_root_dir to one that is") from error
    return folder


def find_checkpoint(given: Any, root: Path, required: bool) -> tuple[str | None, Path | None]:
    """The checkpoint file to resume from and the adapter folder to start from, of which at most one is set.

    Args:
        given: ``last`` (where there is none, the furthest of the others), ``best``, a .ckpt file, an adapter folder, or None.
        root: The run folder that ``last`` and ``best`` are looked for in.
        required: Whether a missing ``last`` is an error; a fit without one begins at the beginning, so that one command serves both.

    Raises:
        UserError: there is no such thing.
    """
    if given is None:
        return None, None
    path = Path(str(given))
    if str(given) in ("last", "best"):
        path = root / FOLDER / f"{given}.ckpt"
        if not path.is_file() and str(given) == "last" and (furthest := furthest_checkpoint(path.parent)) is not None:
            say(f"No {path}: going on from {furthest[1]}, of step {furthest[0]}")
            return str(furthest[1]), None
        if not path.is_file() and str(given) == "last" and not required:
            say(f"No {path} yet: beginning at the beginning")
            return None, None
    if path.is_dir() and (path / ADAPTER_FILE).is_file():
        return None, path
    if not path.is_file():
        raise UserError(f"--ckpt_path {given}: there is no {path}; give last, best, a .ckpt file or an adapter folder")
    return str(path), None


def check_folder(root: Path, continues: bool, overwrite: bool, source: Path | None) -> None:
    """Make sure that a new run does not mix with an old one, nor delete what it starts from.

    Args:
        root: The run folder.
        continues: Whether the run goes on with what the folder holds.
        overwrite: Whether the folder's run may be deleted.
        source: Checkpoint or adapter folder that the run starts from, or None.

    Raises:
        UserError: the folder holds a run that is neither continued nor given up.
    """
    if overwrite and (continues or (source is not None and lies_in(source, root))):
        raise UserError(
            f"--overwrite would delete the run in {root} that --ckpt_path starts from; leave one out or set --trainer.default_root_dir"
        )
    if not continues and not overwrite and any((root / name).exists() for name in (FOLDER, METRICS_FILE)):
        raise UserError(
            f"run folder {root} holds an earlier run; continue it with --ckpt_path last, name another with --trainer.default_root_dir, "
            "or delete it with --overwrite"
        )


def clear_folder(root: Path) -> None:
    """Delete the checkpoints, metrics, samples, MMLU evaluations and list of steps without an update of an earlier run."""
    deleted = root / f"{FOLDER}{DELETED}"
    shutil.rmtree(deleted, ignore_errors=True)
    if (root / FOLDER).is_dir():
        (root / FOLDER).rename(deleted)  # at once: half a folder could be taken for the new run's
    for folder in (deleted, root / MMLU_FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    for name in (METRICS_FILE, SAMPLES_FILE, NONFINITE_FILE):
        (root / name).unlink(missing_ok=True)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or something in it."""
    return path.resolve().is_relative_to(folder.resolve())
