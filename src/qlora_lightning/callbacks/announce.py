"""What a run is going to do, before the model loads, and where its result lies, at the end."""

import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.adapter_checkpoint import run_checkpoints
from qlora_lightning.callbacks.monitor import peak_memory_gib
from qlora_lightning.callbacks.run_files import write_audit
from qlora_lightning.console import console, say
from qlora_lightning.module import QLoRAModule
from qlora_lightning.plan import memory_lines, plan_run, plan_table


class Announce(Callback):
    """Print the plan of a fit when its data is ready, held-out loss before training, and a summary with the command to go on with.

    What the data is also goes into the run folder, as ``audit.json``.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._heldout: list[tuple[int, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, QLoRAModule)
        if stage == "fit":
            data = trainer.datamodule  # type: ignore[attr-defined]
            console.print(plan_table(plan_run(trainer, pl_module, data) | memory_lines(trainer, pl_module, data)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With the model loaded: what fails until then must not touch an earlier run's folder."""
        if trainer.is_global_zero:
            write_audit(Path(trainer.default_root_dir), trainer.datamodule, trainer.accumulate_grad_batches)  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep and say each held-out loss. The first is of the untrained model, of which Lightning logs nothing, so it is logged here."""
        if trainer.state.fn != "fit" or "val/loss" not in trainer.callback_metrics:
            return
        loss = float(trainer.callback_metrics["val/loss"])
        if trainer.sanity_checking:
            if trainer.num_sanity_val_steps != float("inf"):
                return  # a part of the held-out rows only: not to be compared
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=0)
        self._heldout.append((trainer.global_step, loss))
        say(f"Held-out loss {'before training' if trainer.sanity_checking else f'after step {trainer.global_step}'}: {loss:.4f}")

    def state_dict(self) -> dict[str, list[tuple[int, float]]]:
        return {"heldout": self._heldout}

    def load_state_dict(self, state_dict: dict[str, list[tuple[int, float]]]) -> None:
        self._heldout = state_dict["heldout"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapter = run_checkpoints(trainer) / "last"
        minutes, seconds = divmod(round(time.perf_counter() - self._began), 60)
        say(f"Done: {trainer.global_step} steps, {minutes} min {seconds} s in all, peak memory {peak_memory_gib(pl_module.device):.2f} GiB")
        if len(self._heldout) > 1:
            (first, before), (last, after) = self._heldout[0], self._heldout[-1]
            say(f"Held-out loss: {before:.4f} (step {first}) -> {after:.4f} (step {last})")
        say(f"Metrics: {trainer.default_root_dir}/metrics.csv")
        if adapter.is_dir():
            say(f"Adapter: {adapter}")
            say(f"Talk to it: qlora-lightning chat {adapter}")
