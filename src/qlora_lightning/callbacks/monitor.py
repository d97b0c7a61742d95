"""Throughput, memory and the share of supervised tokens, of all ranks, once an optimizer step."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from qlora_lightning.console import say
from qlora_lightning.module import QLoRAModule
from qlora_lightning.optim import state_bytes

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Peak allocated memory of a CUDA device, or peak resident memory of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


class Monitor(Callback):
    """Logs train/tokens_per_second (non-padding input tokens), train/supervised_fraction and memory/peak_gib.

    Tokens are those of all ranks, the peak is the highest of any rank.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._evaluation_began = 0.0
        self._tokens = 0
        self._supervised = 0
        self._step = 0
        self._said = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave_out(time.perf_counter() - self._evaluation_began)

    def leave_out(self, seconds: float) -> None:
        """Count so many seconds that have just passed as no training step's."""
        self._started += seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._tokens += batch["num_tokens"]
        self._supervised += batch["num_supervised"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, QLoRAModule)
        pl_module.told |= {"tokens": self._tokens, "supervised": self._supervised, "peak_gib": peak_memory_gib(pl_module.device)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, QLoRAModule)
        if trainer.global_step == self._step:
            return  # the step is not complete
        now, heard = time.perf_counter(), pl_module.heard
        tokens, supervised = (sum(one[name] for one in heard) for name in ("tokens", "supervised"))
        # this rank's with its update counted, the others' up to theirs
        peak_gib = max(peak_memory_gib(pl_module.device), *(one["peak_gib"] for one in heard))
        speed = {"train/tokens_per_second": tokens / (now - self._started), "train/supervised_fraction": supervised / tokens}
        pl_module.log_numbers(speed | {"memory/peak_gib": peak_gib})
        if not self._said and trainer.optimizers[0].state:  # a first step that was skipped has none
            self._said = True
            say_optimizer_state(trainer.optimizers[0])
        self._step, self._started, self._tokens, self._supervised = trainer.global_step, now, 0, 0


@contextmanager
def between_steps(trainer: Trainer) -> Iterator[None]:
    """Time spent in here, in a callback's ``on_train_batch_end``, is no training step's: throughput leaves it out."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what is still to be computed is the step's
    began = time.perf_counter()
    yield
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Monitor):
            callback.leave_out(time.perf_counter() - began)


def say_optimizer_state(optimizer: Optimizer) -> None:
    """Say, after the first update of a session, how large the optimizer's state is and how much of it can be paged out."""
    all_bytes, paged = state_bytes(optimizer)
    say(f"Optimizer state: {all_bytes / GIB:.2f} GiB, {paged / GIB:.2f} GiB of it in unified memory")
