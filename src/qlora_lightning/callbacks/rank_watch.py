"""Tells the roll call where this rank stands, and how long others may wait for it at the end of a step."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from qlora_lightning import rollcall
from qlora_lightning.errors import check_least

LONGEST_STEPS = 3.0
FIRST_STEPS, FIRST_TIMES = 2, 20.0
"""So many steps of a start may keep the others waiting so many times as long: kernels are compiled and graphs captured in them, on a
machine perhaps that has neither in its cache while another one has."""


class RankWatch(Callback):
    """End a run of which a rank hangs, with its name; only the wait at the end of an optimizer step counts.

    What a rank does between two steps (validation, saving, samples, fetching rows) takes as long as it takes.

    Args:
        patience_seconds: How long ranks wait for another at the end of a step, or three times as long as the longest step so far took,
            whichever is more; twenty times as long in the first two steps, which compile.
    """

    def __init__(self, patience_seconds: float = 45.0) -> None:
        check_least("ranks", {"patience_seconds": (patience_seconds, 1)})
        self.patience_seconds = patience_seconds
        self._steps = 0
        self._step = 0
        self._longest = 0.0
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the step, or its next microbatch."""
        call = rollcall.current
        if call is None:
            return
        if call.mine.step is None:
            self._began = time.monotonic()
        call.at(trainer.global_step + 1)
        call.limit_seconds = self._limit()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The module adds the ranks' gradients up after this."""
        if rollcall.current is not None:
            self._longest = max(self._longest, time.monotonic() - self._began) if self._steps >= FIRST_STEPS else 0.0
            rollcall.current.at(trainer.global_step + 1, arrived=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if rollcall.current is not None and trainer.global_step != self._step:
            self._steps += 1
            self._step = trainer.global_step
            rollcall.current.at(None)

    def _limit(self) -> float:
        patience = max(self.patience_seconds, LONGEST_STEPS * self._longest)
        return patience * (FIRST_TIMES if self._steps < FIRST_STEPS else 1.0)
