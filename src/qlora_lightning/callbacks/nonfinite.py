"""Steps whose loss or gradient is no finite number: never applied, named with their rows, and ended or passed over as the user says.

Loss and norm are sums over ranks, the same on each, so all ranks decide alike; the rows are those of all ranks.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.run_files import NONFINITE_FILE, read_nonfinite, write_nonfinite
from qlora_lightning.console import say
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.dataset import Numbers
from qlora_lightning.errors import UserError, check_least
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies import PagedStrategy

_NAMED = 20
"""Rows that a line names at most; ``nonfinite.json`` has all."""


class Nonfinite(Callback):
    """What a fit does about an optimizer step whose loss or gradient is NaN or infinite. Its update is never made.

    Each such step goes into ``nonfinite.json`` of the run folder: {"steps": [{"step", "loss", "grad_norm", "sets": [{"set", "rows"}]}]},
    rows counted from 1 as ``data inspect`` counts them, loss and norm as text because JSON has no NaN.

    Args:
        policy: stop ends the run before anything of the step can be saved. skip leaves weights and optimizer state as they are for that
            step, while schedule and data go on, and counts it (train/skipped).
        patience: How many steps in a row may be skipped; one more ends the run.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", patience: int = 5) -> None:
        check_least("nonfinite", {"patience": (patience, 1)})
        self.policy, self.patience = policy, patience
        self._skipped = self._in_a_row = self._step = 0
        self._bad = False
        self._examples: list[Numbers] = []

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, QLoRAModule)
        self._step = trainer.global_step
        pl_module.on_nonfinite = lambda loss, norm: self._handle(trainer, loss, norm)
        root = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (steps := read_nonfinite(root)):  # a run that goes on from an earlier step meets the later ones again
            write_nonfinite(root, [step for step in steps if step["step"] <= self._step])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._examples.append(batch["examples"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # the step is not complete
        self._step = trainer.global_step
        self._examples.clear()
        if not self._bad:
            self._in_a_row = 0
        self._bad = False
        if self.policy == "skip":
            assert isinstance(pl_module, QLoRAModule)
            pl_module.log_numbers({"train/skipped": float(self._skipped)})

    def _handle(self, trainer: Trainer, loss: float, norm: float) -> None:
        """Write the step down; end the run or let it go on without the update."""
        step, root = trainer.global_step + 1, Path(trainer.default_root_dir)
        assert isinstance(trainer.strategy, PagedStrategy)
        of_ranks = trainer.strategy.of_every_rank(np.concatenate(self._examples).tolist())
        examples = np.concatenate([np.array(examples, np.int64) for examples in of_ranks])
        sets = rows_by_set(examples, trainer.datamodule)  # type: ignore[attr-defined]
        record = {"step": step, "loss": f"{loss:.6g}", "grad_norm": f"{norm:.6g}", "sets": sets}
        trainer.strategy.on_first_rank(lambda: write_nonfinite(root, [*read_nonfinite(root), record]))
        found = f"step {step} has loss {loss:.4g} and gradient norm {norm:.4g}; its rows are {_named(sets)}"
        if self.policy == "stop":
            raise UserError(
                f"{found} ({root / NONFINITE_FILE} has all); no update was made of it and earlier checkpoints are whole: correct the rows, "
                "begin anew with a lower model.optimizer.learning_rate, or pass over such steps: --ckpt_path last --nonfinite.policy skip"
            )
        if self._in_a_row == self.patience:
            raise UserError(
                f"{found}; nonfinite.patience is {self.patience} and so many steps before it were skipped, so the weights or the settings "
                "are at fault, not the rows; begin anew with a lower model.optimizer.learning_rate"
            )
        self._bad = True
        self._skipped += 1
        self._in_a_row += 1
        say(f"warning: {found}; no update was made of it ({self._skipped} skipped so far, {root / NONFINITE_FILE} has all rows)")


def rows_by_set(examples: Numbers, data: InstructionDataModule) -> list[dict[str, Any]]:
    """The rows of a step, set by set, counted from 1.

    Args:
        examples: as ``collate.Batch`` has them, of the whole step.
        data: knows where they come from.
    """
    rows = [np.unique(examples)] if data.streaming else data.train_set.rows_of(examples)
    return [{"set": one.spec.name, "rows": (part + 1).tolist()} for one, part in zip(data.sets, rows, strict=True) if len(part)]


def _named(sets: list[dict[str, Any]]) -> str:
    """``3, 17 of oasst1 and 5 of alpaca``, cut where it is long."""
    left, parts = _NAMED, []
    for one in sets:
        shown = [str(row) for row in one["rows"][:left]]
        left -= len(shown)
        more = len(one["rows"]) - len(shown)
        parts.append(f"{', '.join([*shown, f'{more} more'] if more else shown)} of {one['set']}")
    return " and ".join(parts)
