"""Files that a run leaves in its folder beside metrics and checkpoints: audit.json, samples.jsonl, nonfinite.json, mmlu/."""

import json
from pathlib import Path
from typing import Any

from qlora_lightning.data.account import account
from qlora_lightning.data.audit import padding_waste
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.steps import StepShape

AUDIT_FILE, SAMPLES_FILE, NONFINITE_FILE, MMLU_FOLDER = "audit.json", "samples.jsonl", "nonfinite.json", "mmlu"
SAMPLE_COLUMNS = ("step", "prompt", "generation", "reference")
"""Of ``samples.jsonl`` and of the table in W&B. step: optimizer steps taken, 0 before training."""


def write_audit(root: Path, data: InstructionDataModule, accumulate: int) -> None:
    """Write what a fit's data is into ``root/audit.json``.

    It holds {"sets": [...], "layout", "padding"}. sets: an entry for each set and part, see ``account``. layout: random, grouped or packed.
    padding: the share of the batches that is padding, expected from the first epoch's plan; null for a stream, which has no plan.

    Args:
        root: the run folder.
        data: the data module, set up for the fit.
        accumulate: the trainer's accumulate_grad_batches.
    """
    content = {"sets": account(data.sets), "layout": _layout(data), "padding": None if data.streaming else _padding(data, accumulate)}
    _write_whole(root / AUDIT_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _layout(data: InstructionDataModule) -> str:
    if data.packing:
        return "packed"
    return "grouped" if data.group_by_length and not data.streaming else "random"


def _padding(data: InstructionDataModule, accumulate: int) -> float:
    shape = StepShape(data.global_batch_size, accumulate, pack_length=data.pack_length)
    return padding_waste(data.train_set, shape, data.pad_to_multiple_of, data.seed, data.group_by_length)


def read_samples(root: Path) -> list[dict[str, Any]]:
    """The rows of ``root/samples.jsonl``; none where there is no such file."""
    path = root / SAMPLES_FILE
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:  # not `splitlines`, which also splits where a text holds U+2028
        return [json.loads(line) for line in file]


def write_samples(root: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` (keys ``SAMPLE_COLUMNS``) in place of the old file: whole, so that a kill never leaves half a step."""
    _write_whole(root / SAMPLES_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def drop_samples_after(root: Path, step: int) -> None:
    """Drop the rows of later steps than ``step``, which a run that goes on from there will write again; -1 drops all."""
    if rows := read_samples(root):
        write_samples(root, [row for row in rows if row["step"] <= step])


def read_nonfinite(root: Path) -> list[dict[str, Any]]:
    """The steps in ``root/nonfinite.json``, see ``callbacks/nonfinite.py``; none where there is no such file."""
    path = root / NONFINITE_FILE
    steps: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.is_file() else []
    return steps


def write_nonfinite(root: Path, steps: list[dict[str, Any]]) -> None:
    """Write ``steps`` in place of the old file."""
    _write_whole(root / NONFINITE_FILE, json.dumps({"steps": steps}, indent=1, ensure_ascii=False) + "\n")


def write_mmlu(root: Path, name: str, document: dict[str, Any]) -> None:
    """Write an MMLU evaluation as ``root/mmlu/<name>.json``."""
    (root / MMLU_FOLDER).mkdir(parents=True, exist_ok=True)
    _write_whole(root / MMLU_FOLDER / f"{name}.json", json.dumps(document, indent=2) + "\n")


def mmlu_name(step: int) -> str:
    """The name of a fit's evaluation after ``step`` optimizer steps: six digits, eight being those of a checkpoint that is validated."""
    return f"step-{step:06d}"


def drop_mmlu_after(root: Path, step: int) -> None:
    """Delete a fit's evaluations after more than ``step`` optimizer steps, as ``drop_samples_after``."""
    for file in (root / MMLU_FOLDER).glob("step-??????.json"):
        if file.stem > mmlu_name(step):
            file.unlink()


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
