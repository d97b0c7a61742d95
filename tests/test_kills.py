"""Runs that are killed and go on end as the one that was left alone: ``benchmarks/kills.py`` in small, and that it can fail."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from run_difference import broken_checkpoints, differences  # noqa: E402

HARNESS = [sys.executable, str(BENCHMARKS / "kills.py")]
KILLS = ["--kills", "8", "--each", "4", "--seed", "3", "--work"]
UNSAVED_RANDOM_STATE = """
import sys
from qlora_lightning.callbacks.random_state import RandomState
RandomState.load_state_dict = lambda self, state: None
import kills
sys.argv[0] = "kills.py"
sys.exit(kills.main())
"""


@pytest.mark.slow
def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    """Eight kills, at random moments and before random file operations."""
    done = subprocess.run([*HARNESS, *KILLS, str(tmp_path / "work")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills in " in done.stdout and ": 0 lost, 0 different" in done.stdout


@pytest.mark.slow
def test_a_random_state_that_is_not_restored_is_seen(tmp_path: Path) -> None:
    """A few kills are enough: dropout draws other masks after one in the middle."""
    command = [sys.executable, "-c", UNSAVED_RANDOM_STATE, "--kills", "3", "--each", "3", "--seed", "3", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differs: rows of metrics.csv" in done.stdout


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> tuple[Path, Path]:
    """Two runs of the same command that were left alone."""
    from running import base_options

    from qlora_lightning.cli import main

    root = tmp_path_factory.mktemp("pair") / "run"
    command = ["fit", *base_options(tiny_base, rows_file, root), "--trainer.max_steps", "2"]
    assert main(command) == 0
    first = Path(shutil.copytree(root, root.with_name("first")))
    assert main([*command, "--overwrite"]) == 0
    return first, root


def test_the_same_run_twice_is_equal(pair: tuple[Path, Path]) -> None:
    assert differences(*pair) == []
    assert broken_checkpoints(pair[0]) == []


def another_moment(file: Path) -> None:
    """One value of the optimizer's state, by the last bit of its mantissa."""
    checkpoint = torch.load(file, weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"][0]
    state["exp_avg"][5] = torch.nextafter(state["exp_avg"][5], torch.tensor(torch.inf))
    torch.save(checkpoint, file)


@pytest.mark.parametrize(
    "name, spoil, found",
    [
        ("metrics.csv", lambda file: file.write_text(file.read_text() + "1,\n"), "rows of metrics.csv: 2 and 3"),
        ("samples.jsonl", lambda file: file.write_text("{}\n"), "samples.jsonl"),
        ("checkpoints/last.ckpt", another_moment, "checkpoints/last.ckpt: /optimizer_states/0/state/0/exp_avg"),
        ("checkpoints/last/adapter_model.safetensors", lambda file: file.write_bytes(b"x"), "checkpoints/last/adapter_model.safetensors"),
        ("checkpoints/last.ckpt.partial", Path.touch, "name checkpoints/last.ckpt.partial"),
    ],
)
def test_what_differs_is_found(pair: tuple[Path, Path], tmp_path: Path, name: str, spoil: Callable[[Path], None], found: str) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    spoil(other / name)
    assert found in differences(pair[0], other)


def test_what_is_not_whole_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other")) / "checkpoints"
    shutil.rmtree(other / "last")
    file = other / "step-00000002.ckpt"
    file.write_bytes(file.read_bytes()[:-1])
    broken = broken_checkpoints(other.parent)
    assert [line.partition(":")[0] for line in broken] == ["last.ckpt", "step-00000002.ckpt"]
