"""Runs that are killed and go on end as the one that was left alone: ``benchmarks/kills.py`` in small, and that it can fail."""

import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from forked import ended

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from run_difference import broken_checkpoints, differences  # noqa: E402


def kill(options: list[str], said: Path, restored: bool) -> None:
    """In a process of its own: the benchmark, and what it says to standard output; with random states restored, or not."""
    import kills

    from qlora_lightning.callbacks.random_state import RandomState

    if not restored:
        RandomState.on_load_checkpoint = lambda *_: None  # type: ignore[method-assign,assignment]
    sys.argv = ["kills.py", *options]
    with said.open("w") as out, redirect_stdout(out):
        code = kills.main()
    sys.exit(code)


@pytest.mark.slow
def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    """Eight kills, at random moments and before random file operations."""
    options, said = ["--kills", "8", "--each", "4", "--seed", "3", "--work", str(tmp_path / "work")], tmp_path / "said"
    assert ended(kill, options, said, True) == 0, said.read_text()
    assert "8 kills in " in said.read_text() and ": 0 lost, 0 different" in said.read_text()


@pytest.mark.slow
def test_a_random_state_that_is_not_restored_is_seen(tmp_path: Path) -> None:
    """A few kills are enough: dropout draws other masks after one in the middle."""
    options, said = ["--kills", "3", "--each", "3", "--seed", "3", "--work", str(tmp_path / "work")], tmp_path / "said"
    assert ended(kill, options, said, False) == 1, said.read_text()
    assert "differs: rows of metrics.csv" in said.read_text()


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
