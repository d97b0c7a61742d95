"""The random state of a run: saved with each checkpoint, put back at the first batch after a resume, untouched by evaluation."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and every CUDA device's generator, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave, on a machine with as many CUDA devices."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


class RandomState(Callback):
    """Keep dropout's random stream the same whether or not a run is interrupted or evaluated on the way.

    Lightning saves no random state. It is put back at the first batch and not when the checkpoint is read, because what lies between
    (building loaders, sanity checks) may draw from it. Evaluation draws too, so it starts from a copy that is put back after.
    What is saved is the state at the end of the last whole step: a run that SIGTERM stops inside the next one begins that one again.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._before_evaluation: dict[str, Any] | None = None
        self._after_step: dict[str, Any] | None = None
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        return self._restored or self._after_step or random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._restored is not None:
            set_random_state(self._restored)
            self._restored, self._after_step, self._step = None, self._restored, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step:
            self._step, self._after_step = trainer.global_step, random_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_evaluation = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_evaluation is not None:
            set_random_state(self._before_evaluation)
            self._before_evaluation = None
