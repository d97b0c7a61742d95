"""Whether two run folders hold the same run, bit for bit, and whether the checkpoints of one are whole."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MEASURED = ("train/tokens_per_second", "memory/peak_gib")
"""Columns of metrics.csv that no two runs share."""


def broken_checkpoints(root: Path) -> list[str]:
    """What is not whole among the checkpoints that a reader would find by name: files, adapter folders, pairs."""
    found = []
    for file in sorted((root / "checkpoints").glob("*.ckpt")):
        try:
            with zipfile.ZipFile(file) as records:
                assert records.testzip() is None
            torch.load(file, weights_only=True)
            folder = file.with_suffix("")
            load_file(folder / "adapter_model.safetensors")
            json.loads((folder / "qlora_lightning.json").read_text())
        except Exception as error:
            found.append(f"{file.name}: {type(error).__name__} {error}")
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs: metrics (all but speed and memory), samples, names in the folder, checkpoints, adapters."""
    found = [f"rows of metrics.csv: {line}" for line in _different_rows(_rows(one), _rows(other))]
    texts = [(root / "samples.jsonl").read_text() if (root / "samples.jsonl").is_file() else None for root in (one, other)]
    found += ["samples.jsonl"] if texts[0] != texts[1] else []
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (one, other)]
    found += [f"name {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if name.endswith(".ckpt"):
            mine, theirs = (torch.load(root / name, weights_only=True) for root in (one, other))
            found += [f"{name}: {place}" for place in _different_values(mine, theirs, "")]
        elif name.endswith(".safetensors") and (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
        elif name.endswith("qlora_lightning.json"):
            steps = [json.loads((root / name).read_text())["step"] for root in (one, other)]
            found += [f"{name}: step {steps[0]} and {steps[1]}"] if steps[0] != steps[1] else []
    return found


def _rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in MEASURED} for row in csv.DictReader(file)]


def _different_rows(one: list[dict[str, str]], other: list[dict[str, str]]) -> list[str]:
    if len(one) != len(other):
        return [f"{len(one)} and {len(other)}"]
    return [f"{mine} and {theirs}" for mine, theirs in zip(one, other, strict=True) if mine != theirs]


def _different_values(one: Any, other: Any, place: str) -> list[str]:
    """Places of nested values at which two checkpoints differ."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [place]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in _different_values(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [line for number, pair in enumerate(zip(one, other, strict=True)) for line in _different_values(*pair, f"{place}/{number}")]
    return [] if one == other else [f"{place} ({str(one)[:40]} and {str(other)[:40]})"]
