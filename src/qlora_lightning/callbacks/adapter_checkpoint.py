"""Checkpoints to resume from, each beside a PEFT adapter folder to use: ``last``, ``best`` and every n steps."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from qlora_lightning.callbacks.run_files import SAMPLES_FILE
from qlora_lightning.card import adapter_card
from qlora_lightning.disk import ASIDE, disk_trouble, link, link_tree, replace_folder, sync, sync_tree
from qlora_lightning.errors import UserError
from qlora_lightning.interruption import Interrupted
from qlora_lightning.loggers import RunCSVLogger, RunWandbLogger
from qlora_lightning.modeling.adapters import METADATA_FILE, save_adapter
from qlora_lightning.module import QLoRAModule
from qlora_lightning.redaction import redacted_values
from qlora_lightning.strategies.checkpoint_io import PARTIAL, DamagedCheckpoint, read_checkpoint

FOLDER, DRAFT = "checkpoints", ".next"


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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also of a run that was killed after its last save: it has no step left, and Lightning no end of training for it."""
        if trainer.is_global_zero:
            self._remove_old(trainer, later=False)
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.upload_adapter(run_checkpoints(trainer) / "last", {"step": trainer.global_step})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the run is told to stop and the state is whole: see ``callbacks/stop.py``."""
        if isinstance(exception, Interrupted) and exception.step is not None and trainer.global_step != self._saved_step:
            self._save_step(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._due:
            self._due = False
            self._save_step(trainer)

    def _save_step(self, trainer: Trainer) -> None:
        """Save ``last`` and, where they are kept, ``step-<n>``: the same files under other names."""
        name = f"step-{trainer.global_step:08d}" if self.keep else None
        self._save(trainer, "last", name)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._remove_old(trainer)

    def _save(self, trainer: Trainer, name: str, also: str | None = None) -> None:
        """Write a checkpoint and its adapter folder as ``name``; as ``also`` before, which is a further name of the same files."""
        place = run_checkpoints(trainer) / name
        with _naming_disk_trouble(trainer, place.parent):
            if trainer.is_global_zero:
                self._draft_adapter(trainer, place)
            if also is None:
                _publish(trainer, place, trainer.save_checkpoint)
                return
            step = place.with_name(also)
            if trainer.is_global_zero:
                link_tree(_draft(place), _draft(step))
            _publish(trainer, step, trainer.save_checkpoint)
            if trainer.is_global_zero:
                _publish(trainer, place, lambda file: _name_too(step.with_suffix(".ckpt"), file))

    def _draft_adapter(self, trainer: Trainer, place: Path) -> None:
        """Write the folder that is to be at ``place`` beside it, its metadata last: what has those is whole."""
        module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(module, QLoRAModule)
        root = Path(trainer.default_root_dir)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        metadata = redacted_values(module.metadata() | data.metadata() | {"step": trainer.global_step, "metrics": metrics})
        draft = _draft(place)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        data.tokenizer.save_pretrained(draft)
        config = root / "config.yaml"
        if config.is_file():
            shutil.copy(config, draft / "recipe.yaml")
        save_adapter(module.model, draft, metadata, adapter_card(metadata, place))
        sync_tree(draft)
        logged = [logger.path for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]
        for file in (*logged, root / SAMPLES_FILE):  # a checkpoint never knows of steps that they do not
            if file.is_file():
                sync(file)

    def _remove_old(self, trainer: Trainer, later: bool = True) -> None:
        """Keep the newest. Those of ``later`` steps count as older, as the run began again before them; False leaves them alone."""
        if not self.keep:
            return
        now, folder = f"step-{trainer.global_step:08d}", run_checkpoints(trainer)
        names = {path.stem for path in folder.glob("step-*") if later or path.stem <= now}
        for name in sorted(names, key=lambda name: (name <= now, name))[: -self.keep]:
            place = folder / name
            place.with_suffix(".ckpt").unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)


def run_checkpoints(trainer: Trainer) -> Path:
    """The folder of a run's checkpoints."""
    return Path(trainer.default_root_dir, FOLDER)


def _draft(place: Path) -> Path:
    """Where the adapter folder that is to be at ``place`` is written."""
    return place.with_name(place.name + DRAFT)


def _publish(trainer: Trainer, place: Path, write: Callable[[Path], None]) -> None:
    """Put the drafted adapter folder at ``place``, and beside it the checkpoint that ``write`` writes.

    A new folder comes first: a checkpoint whose name is there has an adapter beside it. In place of another it comes after: until the
    checkpoint's name is there the earlier pair stands, and from then on ``put_right`` can finish what a kill leaves.
    """
    first = trainer.is_global_zero and not place.exists()
    if first:
        replace_folder(_draft(place), place)
    try:
        write(place.with_suffix(".ckpt"))
    except BaseException:
        if first:
            shutil.rmtree(place)
        raise
    if trainer.is_global_zero and not first:
        replace_folder(_draft(place), place)


def put_right(folder: Path) -> None:
    """Finish or drop what a kill left half done in a folder of checkpoints: then each has the adapter of its own step beside it."""
    for draft in folder.glob(f"*{DRAFT}"):
        place = draft.with_name(draft.name.removesuffix(DRAFT))
        file = place.with_suffix(".ckpt")
        if file.is_file() and (draft / METADATA_FILE).is_file() and _step_of(draft) == _step_in(file):
            replace_folder(draft, place)
        else:
            shutil.rmtree(draft)
    for old in folder.glob(f"*{ASIDE}"):
        shutil.rmtree(old)
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink()


def _step_of(adapter: Path) -> int | None:
    """The step of an adapter folder; None where its metadata are cut short."""
    with suppress(ValueError):
        return int(json.loads((adapter / METADATA_FILE).read_text(encoding="utf-8"))["step"])
    return None


def _step_in(file: Path) -> int | None:
    """The step of a checkpoint; None where it is damaged, which is said where it is asked for."""
    with suppress(DamagedCheckpoint, UserError):
        return int(read_checkpoint(file, lazily=True)["global_step"])
    return None


def _name_too(file: Path, name: Path) -> None:
    """Give ``file`` the name of another file, which stands until then."""
    beside = name.with_name(name.name + PARTIAL)
    link(file, beside)
    beside.replace(name)
    sync(name.parent)


@contextmanager
def _naming_disk_trouble(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Turn a disk that takes no more into one line, and leave nothing of the attempt. The earlier checkpoint was never touched."""
    try:
        yield
    except Exception as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        with suppress(OSError):
            put_right(folder)
        last = folder / "last.ckpt"
        earlier = f"{last} of step {_step_in(last)} is whole" if last.is_file() else "there is no earlier one"
        free = shutil.disk_usage(folder).free / 2**30 if folder.is_dir() else 0.0
        raise UserError(
            f"the checkpoint of step {trainer.global_step} cannot be written to {folder} ({reason}; {free:.2f} GiB free there); {earlier}; "
            "make room or let the folder be written to, then go on with the same command and --ckpt_path last"
        ) from error
