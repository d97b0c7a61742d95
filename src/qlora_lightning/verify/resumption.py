"""Did a run that was resumed go the way of the one that was not? Read from what both leave in their folders."""

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_lightning.modeling.adapters import ADAPTER_FILE
from qlora_lightning.verify.outcome import BITS, Bound, Findings, Measurement, relative, relative_loss

LOGGED = ("train/loss", "train/grad_norm")


def resumption(whole: Path, resumed: Path, first: int, loss_bound: Bound = BITS) -> Findings:
    """Compare two run folders from optimizer step ``first`` on, counted from 0.

    Args:
        whole: of the run that went through.
        resumed: of the one that began at ``first``, from the other's checkpoint.
        first: the step.
        loss_bound: what losses are held to; adapter and optimizer are compared only bit for bit, as any difference grows in them.
    """
    mine, theirs = ([row for row in _metrics(folder) if int(row["step"]) >= first] for folder in (resumed, whole))
    steps = [row["step"] for row in theirs]
    if not steps or steps != [row["step"] for row in mine]:
        return Findings([Measurement(f"steps logged: {len(mine)} of {len(theirs)}", float("inf"), BITS)])
    measured = [
        Measurement(
            f"{name.removeprefix('train/')} of steps {first + 1} to {int(steps[-1]) + 1}",
            max(relative_loss(float(one[name]), float(other[name])) for one, other in zip(mine, theirs, strict=True)),
            loss_bound,
        )
        for name in LOGGED
    ]
    if loss_bound is not BITS:
        return Findings(measured, "adapter and optimizer are not compared: this path does not promise equal bits")
    for what, read in (("adapter", _adapter), ("optimizer's state", _optimizer)):
        measured.append(Measurement(f"{what} at the end", _distance(read(resumed), read(whole)), BITS))
    return Findings(measured)


def _metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def _adapter(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(folder / "checkpoints" / "last" / ADAPTER_FILE)
    return weights


def _optimizer(folder: Path) -> dict[str, Tensor]:
    states: Any = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["optimizer_states"]
    return {
        f"{number} {parameter} {name}": torch.as_tensor(value)
        for number, state in enumerate(states)
        for parameter, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor | int | float)
    }


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of two tensors of one name; infinite where there are none, or one has names that the other lacks."""
    if not one or one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    return max(relative(one[name], other[name]) for name in one)
