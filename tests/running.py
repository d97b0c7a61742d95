"""Options of small runs and what they leave, for the tests that run the command line."""

import csv
from functools import cache
from pathlib import Path

import docstring_parser
import pytest

from qlora_lightning.cli import main

# Every parser reads the sources of all classes that options can name, for their help. They stay as they are, in a process of many runs.
docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)


def base_options(base: Path, rows: Path, root: Path) -> list[str]:
    """Options of every small run: fp32, four rows a step, no dropout, no W&B."""
    options = {
        "model.base_model": base,
        "model.compute": "fp32",
        "model.lora.r": 4,
        "model.lora.dropout": 0.0,
        "model.optimizer.learning_rate": 0.01,
        "data.dataset.path": rows,
        "data.dataset.template": "chatml",
        "data.global_batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": root,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def read_metrics(root: Path) -> list[dict[str, str]]:
    """Rows of a run's metrics.csv."""
    with (root / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def line_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The last line of a command that must fail by the user's mistake."""
    assert main(list(command)) == 2
    return capsys.readouterr().err.strip().split("\n")[-1].removeprefix("qlora-lightning: ")
