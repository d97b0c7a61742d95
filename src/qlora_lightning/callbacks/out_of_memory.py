"""What to tell a user whose run found no memory: what was asked for, what there was, and what to lower to which value."""

import os
import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.monitor import GIB, peak_memory_gib
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.errors import memory_error
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import MemoryPolicy

_STRATEGY = "--trainer.strategy.init_args"


class OutOfMemory(Callback):
    """Adds its line, as a note, to an error that says that memory is out; the command line prints the note."""

    def __init__(self) -> None:
        self._training: tuple[int, int] | None = None
        self._evaluating: tuple[int, int] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._training = _shape(batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._training = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluating = _shape(batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluating = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        error, shape = memory_error(exception), self._training or self._evaluating
        if error is None or shape is None:
            return
        assert isinstance(pl_module, QLoRAModule)
        data: InstructionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        gpu = device.type == "cuda"
        found = f"asked for {_asked(error)}, with {memory_in_use(device)}"
        rows, tokens = shape
        if self._training is None:
            way_out = f"set --data.eval_batch_size {max(1, rows // 2)}" if rows > 1 else "use a GPU with more memory"
            error.add_note(f"out of memory while scoring {rows} held-out rows x {tokens:,} tokens, which {found}; {way_out}")
            return
        step = f"out of memory in step {trainer.global_step + 1}: a microbatch of {rows} rows x {tokens:,} tokens"
        way_out = what_to_lower(
            data.global_batch_size // trainer.world_size, trainer.accumulate_grad_batches, tokens, pl_module.policy, gpu
        )
        error.add_note(f"{step} {found}; {way_out}")


def what_to_lower(batch_size: int, accumulate: int, tokens: int, policy: MemoryPolicy, gpu: bool) -> str:
    """The ways out of a step that does not fit, those first that a run can go on with.

    Args:
        batch_size: examples of a step on one device.
        accumulate: the microbatches that they are divided into.
        tokens: of the longest row of the step.
        policy: what the run may keep.
        gpu: whether it is a GPU's memory; a CPU's optimizer state has 32 bits always.
    """
    finer = next((k for k in range(accumulate + 1, batch_size + 1) if batch_size % k == 0), None)
    now = [f"--trainer.accumulate_grad_batches {finer} ({batch_size // finer} examples at a time, same results)"] if finer else []
    if policy.gradient_checkpointing != "full":
        now.append(f"{_STRATEGY}.gradient_checkpointing full")
    anew = [f"--data.dataset.max_length {max(1, tokens // 2)}"]
    if gpu and policy.optimizer_bits == 32:
        anew.append(f"{_STRATEGY}.optimizer_bits 8")
    if not now:
        return f"only a new run can use less: {' or '.join(anew)}; the checkpoints stay"
    return (
        f"checkpoints stay, and the same command goes on with --ckpt_path last and {' or '.join(now)}; "
        f"a new run can also use {' or '.join(anew)}"
    )


def memory_in_use(device: torch.device) -> str:
    """Words for what this process has in use, and what is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return f"{used / GIB:.2f} GiB in use, {(free + reserved - used) / GIB:.2f} GiB free of {total / GIB:.2f}"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{peak_memory_gib(device):.2f} GiB in use at most, {free / GIB:.2f} GiB free"


def _asked(error: BaseException) -> str:
    """How much was asked for, in the words of torch, which gives it in bytes on a CPU and with its unit on a GPU."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if found is None:
        return "more memory than there is"
    number, unit = found.groups()
    if unit != "bytes":
        return f"{number} {unit}"
    size = int(number)
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.2f} MiB"


def _shape(batch: Any) -> tuple[int, int]:
    rows, tokens = batch["input_ids"].shape
    return rows, tokens
