"""``plan --measure``: the longest step of a fit, really taken, saved and reloaded, beside what was planned of it."""

import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from torch.utils.data import DataLoader

from qlora_lightning.callbacks.adapter_checkpoint import run_checkpoints
from qlora_lightning.callbacks.announce import Announce
from qlora_lightning.console import say
from qlora_lightning.data.collate import Collator
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.steps import Microbatch, StepDataset
from qlora_lightning.lightning_cli import QLoRACLI, resolve_names
from qlora_lightning.modeling.ledger import ledger
from qlora_lightning.modeling.tokenizer import filler_id
from qlora_lightning.module import QLoRAModule
from qlora_lightning.optim import state_bytes
from qlora_lightning.plan.longest import Ahead, longest_microbatches
from qlora_lightning.plan.memory import ADAPTER, CONSTANTS, GRADIENT, LINEAR, OTHERS
from qlora_lightning.plan.outlook import Outlook
from qlora_lightning.recipes import shared_defaults

GIB = 2**30
TOLERANCE = 0.1
"""How far a measured figure may lie from the planned one."""
_SAID = {True: "yes", False: "no", None: "not comparable"}
_STEPS = {"cuda": 6, "cpu": 3}
_COLD = {"cuda": 2, "cpu": 1}
"""Steps before the speed counts: kernels are compiled in the first, graphs captured in the second."""
_WATCHED = 0.05  # seconds between two looks at the process's memory
_ONLY_THE_STEP = {
    "trainer.max_epochs": "1",
    "trainer.limit_train_batches": "null",
    "trainer.limit_val_batches": "0",
    "trainer.num_sanity_val_steps": "0",
    "trainer.logger": "false",
    "samples.count": "0",
    "samples.every_n_steps": "null",
    "mmlu.path": "null",
    "ckpt_path": "null",
    "overwrite": "false",
}
"""Options that leave training alone of a fit."""


@dataclass(frozen=True)
class Figure:
    """One thing that was planned and measured, in bytes."""

    name: str
    planned: int
    measured: int
    held: bool = True
    """Whether the two are the same thing. A CPU process's memory also has what the allocator keeps and operators use for scratch."""

    @property
    def off(self) -> float:
        """Measured over planned, less one."""
        return self.measured / self.planned - 1

    @property
    def within(self) -> bool | None:
        """Whether that is within the tolerance; None where it is not held to it."""
        return abs(self.off) <= TOLERANCE if self.held else None


@dataclass(frozen=True)
class Measured:
    """What the longest step took."""

    device: str
    figures: list[Figure]
    reserved: int | None
    """Bytes of a GPU at the peak, by torch's allocator; None on a CPU."""
    tokens_per_second: float
    """Of the step once it is warm, padding not counted."""
    save_seconds: float
    reload_seconds: float
    checkpoint: int
    """Bytes of a checkpoint."""
    adapter: int
    """Bytes of an adapter folder, tokenizer and all."""

    def run_seconds(self, ahead: Ahead) -> float:
        """All steps of the run at this speed."""
        return ahead.tokens / self.tokens_per_second

    def document(self) -> dict[str, Any]:
        """As plain values, in bytes, seconds and tokens/s."""
        return {
            "device": self.device,
            "figures": [{"name": one.name, "planned": one.planned, "measured": one.measured, "within": one.within} for one in self.figures],
            "tolerance": TOLERANCE,
            "reserved": self.reserved,
            "tokens_per_second": self.tokens_per_second,
            "save_seconds": self.save_seconds,
            "reload_seconds": self.reload_seconds,
            "checkpoint": self.checkpoint,
            "adapter": self.adapter,
        }

    def table(self) -> Table:
        """For the terminal."""
        table = Table("measured", "planned, GiB", "measured, GiB", "off", f"within {TOLERANCE:.0%}", pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for one in self.figures:
            cells = (
                f"{one.planned / GIB:.3f}",
                f"{one.measured / GIB:.3f}",
                f"{one.off:+.1%}",
                _SAID[one.within],
            )
            table.add_row(one.name, *cells)
        reserved = "" if self.reserved is None else f"reserved by torch at the peak: {self.reserved / GIB:.2f} GiB; "
        table.caption = (
            f"{reserved}{self.tokens_per_second:,.0f} tokens/s once warm; saved in {self.save_seconds:.2f} s, reloaded in "
            f"{self.reload_seconds:.2f} s; checkpoint {self.checkpoint / GIB:.3f} GiB, adapter folder {self.adapter / GIB:.3f} GiB"
        )
        table.caption_justify = "left"
        return table


def measure(options: list[str], outlook: Outlook, data: InstructionDataModule, trainer: Trainer) -> Measured:
    """Take the longest step a few times with all settings of the fit.

    Args:
        options: of ``fit``.
        outlook: the plan, for this machine's device.
        data: that of the plan, set up.
        trainer: that of the plan.
    """
    folder = Path(trainer.default_root_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())  # the disk that the run will write to
    kind = trainer.strategy.root_device.type
    microbatches = None if data.streaming else longest_microbatches(data, trainer.accumulate_grad_batches)
    which = "the longest step, again and again" if microbatches else "the stream's first steps"
    say(f"Measuring {_STEPS[kind]} steps: {which}")
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=there) as beside:
        watch = _Watch(_COLD[kind])
        _MeasuringCLI(options, Path(beside), _STEPS[kind], microbatches, watch)
        return watch.measured(outlook, run_checkpoints(watch.trainer) / "last")


class _Repeated(InstructionDataModule):
    """The rows of another data module, and of its microbatches the same few again and again."""

    def __init__(self, other: InstructionDataModule, microbatches: list[Microbatch], steps: int) -> None:
        vars(self).update(vars(other))
        self._microbatches, self._steps = microbatches * steps, steps

    @property
    def total_steps(self) -> int:
        """Those that are taken, however few the rows would give: each step at or behind a run's last one is saved."""
        return self._steps

    def train_dataloader(self) -> DataLoader[Any]:
        collator = Collator(filler_id(self.tokenizer), self.pad_to_multiple_of)
        dataset: Any = StepDataset(self.train_set)
        return DataLoader(dataset, batch_sampler=self._microbatches, collate_fn=collator.train)  # type: ignore[arg-type]


class _MeasuringCLI(QLoRACLI):
    """A fit of a few steps in a folder that does not last."""

    def __init__(self, options: list[str], folder: Path, steps: int, microbatches: list[Microbatch] | None, watch: "_Watch") -> None:
        self._microbatches, self._steps, self._watch = microbatches, steps, watch
        forced = _ONLY_THE_STEP | {"trainer.max_steps": str(steps), "trainer.default_root_dir": str(folder)}
        command, *resolved = resolve_names(["fit", *options])
        last = [part for name, value in forced.items() for part in (f"--{name}", value)]
        super().__init__([command, "--config", str(shared_defaults()), *resolved, *last])

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        trainer: Any = self.trainer  # Announce would say where the adapter lies, which does not last
        trainer.callbacks = [*(one for one in trainer.callbacks if not isinstance(one, Announce)), self._watch]

    def before_fit(self) -> None:
        super().before_fit()
        if self._microbatches is not None:
            self.datamodule = _Repeated(self.datamodule, self._microbatches, self._steps)


class _Watch(Callback):
    """Notes what a fit takes."""

    def __init__(self, cold: int) -> None:
        self._cold = cold
        self._before = _own_memory()
        self._ends: list[float] = []
        self._tokens: list[int] = []
        self._read = 0
        self._step = 0
        self._watcher: _HostPeak | None = None
        self.trainer: Trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer = trainer
        if pl_module.device.type == "cpu":
            self._watcher = _HostPeak()
        else:
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # loading is over, and no part of the plan

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._read += batch["num_tokens"]
        if trainer.global_step == self._step:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._ends.append(time.perf_counter())
        self._tokens.append(self._read)
        self._step, self._read = trainer.global_step, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, QLoRAModule)
        device = pl_module.device
        self._rows = ledger(pl_module.model)
        self._flat = pl_module.flat.parameter.nbytes, pl_module.flat.gradient.nbytes
        self._state, self._paged = state_bytes(trainer.optimizers[0])
        if self._watcher is not None:
            self._peak, self._reserved = self._watcher.end() - self._before, None
        else:
            self._peak, self._reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        self._seconds = _save_and_reload(trainer, pl_module)

    def measured(self, outlook: Outlook, last: Path) -> Measured:
        """Beside the plan for the same device."""
        plan = outlook.plans[0]
        frozen = sum(row.num_bytes for row in self._rows if not row.trainable)
        peak = plan.allocated + plan.step.kept + plan.step.working + plan.step.weights
        figures = [
            Figure("weights and constants", sum(plan.parts[part] for part in (LINEAR, CONSTANTS, OTHERS)), frozen),
            Figure("adapter", plan.parts[ADAPTER], self._flat[0]),
            Figure("its gradient", plan.parts[GRADIENT], self._flat[1]),
            Figure("optimizer's state", plan.state, self._state),
            Figure("peak allocated", peak, self._peak) if plan.target.cuda else Figure("peak, process memory", peak, self._peak, False),
        ]
        seconds = [end - begin for begin, end in zip(self._ends[self._cold - 1 :], self._ends[self._cold :], strict=False)]
        speed = self._tokens[-1] / statistics.median(seconds)
        adapter = sum(file.stat().st_size for file in last.iterdir())
        return Measured(plan.target.name, figures, self._reserved, speed, *self._seconds, last.with_suffix(".ckpt").stat().st_size, adapter)


def _save_and_reload(trainer: Trainer, module: QLoRAModule) -> tuple[float, float]:
    """Seconds to write a checkpoint and to take it back: adapter and optimizer's state."""
    file = Path(trainer.default_root_dir, "measured.ckpt")
    began = time.perf_counter()
    trainer.save_checkpoint(file)
    saved = time.perf_counter()
    checkpoint = trainer.strategy.load_checkpoint(file)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return saved - began, time.perf_counter() - saved


def _own_memory() -> int:
    """Resident bytes of this process; on Linux without mapped files, libraries above all."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class _HostPeak:
    """The highest of this process's own memory until ``end``."""

    def __init__(self) -> None:
        self._peak, self._done = _own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(_WATCHED):
            self._peak = max(self._peak, _own_memory())

    def end(self) -> int:
        """Stop looking; bytes."""
        self._done.set()
        self._thread.join()
        return self._peak
