"""``audit.json`` of a run folder: what a fit's data is."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from running import base_options

from qlora_lightning.callbacks.run_files import read_samples, write_audit, write_samples
from qlora_lightning.cli import main
from qlora_lightning.data.audit import padding_waste
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.dataset import DataReport
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.data.steps import StepShape


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A second set, one row of which cannot be used."""
    file = tmp_path / "other.jsonl"
    rows = [{"instruction": f"Other {n}", "output": "" if n == 7 else "yes " * n} for n in range(1, 13)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_fit_says_what_its_data_is(fit: Callable[..., Path], other: Path, tiny_base: Path, rows_file: Path) -> None:
    part = {"dataset": {"path": str(other), "validation_size": 2}, "weight": 0.5}
    root = fit(f"data.mix={json.dumps([part])}", "data.dataset.validation_size=4", "data.group_by_length=false", "trainer.max_steps=1")
    found = json.loads((root / "audit.json").read_text())
    assert [(one["name"], one["part"], one["weight"]) for one in found["sets"]] == [
        ("rows", "training", 1.0),
        ("other", "training", 0.5),
        ("rows", "held-out", None),
        ("other", "held-out", None),
    ]
    data = InstructionDataModule(DatasetSpec(path=DataPath(str(rows_file)), template="chatml", validation_size=4), str(tiny_base))
    data.setup("fit")
    assert data.train_report is not None
    assert {name: found["sets"][0][name] for name in DataReport.__annotations__} == asdict(data.train_report)
    first, second = found["sets"][:2]
    assert first["epoch_share"] + second["epoch_share"] == pytest.approx(1.0, abs=1e-3)
    assert first["epoch_share"] / second["epoch_share"] == pytest.approx(
        first["supervised_tokens"] / (0.5 * second["supervised_tokens"]), rel=0.01
    )
    assert first["supervised_share"] == pytest.approx(first["supervised_tokens"] / first["tokens"], abs=1e-4)
    assert first["lengths"]["max"] == first["length_max"]
    assert sum(bucket["examples"] for bucket in first["lengths"]["histogram"]) == first["kept"]
    assert sum(sum(one["skipped"].values()) for one in found["sets"]) == 1
    assert found["layout"] == "random"
    assert 0 < found["padding"] < 1


@pytest.mark.parametrize(("option", "layout"), [({"packing": True}, "packed"), ({}, "grouped"), ({"group_by_length": False}, "random")])
def test_the_padding_is_that_of_the_runs_own_layout(
    tiny_base: Path, rows_file: Path, tmp_path: Path, option: dict[str, Any], layout: str
) -> None:
    data = InstructionDataModule(DatasetSpec(path=DataPath(str(rows_file)), template="chatml"), str(tiny_base), **option)
    data.setup("fit")
    write_audit(tmp_path, data, accumulate=2)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert [one["part"] for one in found["sets"]] == ["training"]
    shape = StepShape(16, 2, pack_length=data.pack_length)
    expected = padding_waste(data.train_set, shape, 8, data.seed, group_by_length=layout != "random")
    assert (found["layout"], found["padding"]) == (layout, expected)


def test_of_a_stream_the_held_out_rows_are_known(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    spec = DatasetSpec(path=DataPath(str(rows_file)), template="chatml", validation_size=4)
    data = InstructionDataModule(spec, str(tiny_base), streaming=True)
    data.setup("fit")
    write_audit(tmp_path, data, accumulate=1)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert [(one["part"], one["kept"]) for one in found["sets"]] == [("held-out", 4)]
    assert (found["padding"], found["layout"]) == (None, "random")


def test_other_commands_write_none(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    assert main(["validate", *base_options(tiny_base, rows_file, tmp_path / "run"), "--data.dataset.validation_size", "4"]) == 0
    assert not (tmp_path / "run" / "audit.json").exists()


def test_samples_of_any_text_read_back(tmp_path: Path) -> None:
    """One row a line, whatever line ends a text may hold."""
    rows = [
        {"step": 0, "prompt": "a\u2028b\x85c\r\nd", "generation": "日本\x0c", "reference": ""},
        {"step": 2, "prompt": "", "generation": "", "reference": ""},
    ]
    write_samples(tmp_path, rows)
    assert read_samples(tmp_path) == rows
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]
