"""The random state of a run: saved with each checkpoint, put back at the first batch after a resume, untouched by evaluation.

Each rank draws masks of its own: rank 0 those of a run on one device, the others from (seed, step at which they began, rank).
"""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.strategies import PagedStrategy

SAVED = "random_states"
"""The name in a checkpoint of what ``random_state`` gave on each rank."""


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and the current CUDA device's generator, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave; without a CUDA device, or from a machine without one, all but that device's."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Begin a stream of each generator's that belongs to a rank from an optimizer step on."""
    drawn = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(drawn)
    np.random.seed(drawn % 2**32)
    torch.manual_seed(drawn)


class RandomState(Callback):
    """Keep dropout's random stream the same whether or not a run is interrupted or evaluated on the way.

    Lightning saves no random state. It is put back at the first batch and not when the checkpoint is read, because what lies between
    (building loaders, sanity checks) may draw from it. Evaluation draws too, so it starts from a copy that is put back after.
    What is saved is the state at the end of the last whole step: a run that SIGTERM stops inside the next one begins that one again.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []
        self._begun = False
        self._before_evaluation: dict[str, Any] | None = None
        self._after_step: dict[str, Any] | None = None
        self._step = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(trainer.strategy, PagedStrategy)
        mine = trainer.strategy.of_every_rank(self._after_step or random_state())
        checkpoint[SAVED] = mine if self._begun or not self._restored else self._restored

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if SAVED not in checkpoint:
            raise UserError("this checkpoint was not written by this version of qlora-lightning; start from the adapter folder beside it")
        self._restored = checkpoint[SAVED]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._begun:
            self._begun = True
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Put back this rank's state; where there were other ranks, or none yet, begin streams."""
        ranks, had = trainer.world_size, len(self._restored)
        if had == ranks:
            set_random_state(self._restored[trainer.global_rank])
        elif had or trainer.global_rank > 0:
            seed_rank(torch.initial_seed(), trainer.global_step, trainer.global_rank)
        if had not in (0, ranks):
            say(f"The run had {_ranks(had)} and goes on with {_ranks(ranks)}: the same rows in the same steps, dropout masks drawn anew")
        self._after_step, self._step = random_state(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step:
            self._step, self._after_step = trainer.global_step, random_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_evaluation = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_evaluation is not None:
            set_random_state(self._before_evaluation)
            self._before_evaluation = None


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
