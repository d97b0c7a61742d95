"""A run in a dozen numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlora_lightning.report.mmlu import Evaluation, headlines
from qlora_lightning.report.reading import Run
from qlora_lightning.report.settings import base_model, data_set

LAST = 0.1
"""Share of the last training steps over which their loss is averaged: a single step's tells little."""


@dataclass(frozen=True)
class Summary:
    """What a run came to; None for what it did not log. Losses in nats a supervised token, intervals of 95 %."""

    name: str
    folder: str
    base_model: str
    data_set: str
    steps: int
    train_loss: float | None
    """Mean over the last tenth of the steps."""
    val_loss_first: float | None
    """Of the untrained model, where it was logged."""
    val_loss_best: float | None
    val_loss_best_step: int | None
    val_loss_final: float | None
    val_perplexity_final: float | None
    mmlu_accuracy: float | None
    """Mean over subjects."""
    mmlu_interval: tuple[float, float] | None
    mmlu_accuracy_micro: float | None
    mmlu_step: int | None
    mmlu_setting: str | None
    peak_gib: float | None
    tokens_per_second_median: float | None
    training_seconds_estimated: float | None
    """Time in training steps, from the mean tokens of an example, without validation and saving."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """The numbers of each run."""
    return [_summary(run, mmlu) for run, mmlu in zip(runs, headlines([run.mmlu for run in runs]), strict=True)]


def _summary(run: Run, mmlu: Evaluation | None) -> Summary:
    train, held, speed, memory = (_values(run, name) for name in ("train/loss", "val/loss", "train/tokens_per_second", "memory/peak_gib"))
    best = int(np.argmin(held)) if len(held) else 0
    return Summary(
        name=run.name,
        folder=str(run.folder),
        base_model=base_model(run),
        data_set=data_set(run),
        steps=run.steps,
        train_loss=float(np.mean(train[-max(1, round(LAST * len(train))) :])) if len(train) else None,
        val_loss_first=float(held[0]) if len(held) and run.curves["val/loss"].steps[0] == 0 else None,
        val_loss_best=float(held[best]) if len(held) else None,
        val_loss_best_step=int(run.curves["val/loss"].steps[best]) if len(held) else None,
        val_loss_final=float(held[-1]) if len(held) else None,
        val_perplexity_final=_perplexity(run, held),
        **_mmlu(mmlu),
        peak_gib=float(memory.max()) if len(memory) else None,
        tokens_per_second_median=float(np.median(speed)) if len(speed) else None,
        training_seconds_estimated=_seconds(run),
    )


def _values(run: Run, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return run.curves[name].values if name in run.curves else np.zeros(0)


def _perplexity(run: Run, held: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """As logged, else e to the held-out loss."""
    logged = _values(run, "val/perplexity")
    if len(logged):
        return float(logged[-1])
    return math.exp(held[-1]) if len(held) else None


def _mmlu(found: Evaluation | None) -> dict[str, Any]:
    return {
        "mmlu_accuracy": found and found.macro.accuracy,
        "mmlu_interval": found and (found.macro.low, found.macro.high),
        "mmlu_accuracy_micro": found and found.micro,
        "mmlu_step": found and found.step,
        "mmlu_setting": found and str(found.setting),
    }


def _seconds(run: Run) -> float | None:
    """Steps times the tokens of a mean step, over the harmonic mean of the speeds; None without the account of the training sets."""
    speed, data = _values(run, "train/tokens_per_second"), run.config.get("data")
    batch = data.get("global_batch_size") if isinstance(data, dict) else None
    training = [one for one in run.audit if one.get("part") == "training"]
    tokens, examples = (sum((one.get("weight") or 1) * (one.get(name) or 0) for one in training) for name in ("tokens", "kept"))
    if not batch or not len(speed) or not examples or speed.min() <= 0:
        return None
    return float(run.steps * batch * tokens / examples * np.mean(1 / speed))
