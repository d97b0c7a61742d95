"""A run goes on as the run that it was, or says in one line what differs, both values and the way out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import base_options, line_of

from qlora_lightning.cli import main
from qlora_lightning.manifest import check_manifest, different_environment

HELD_OUT = ("--data.dataset.validation_size", "4")


@pytest.fixture(scope="module")
def run_of_two_steps(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a falling learning rate that stands at step 2 of 4; no test changes it."""
    root = tmp_path_factory.mktemp("manifest") / "run"
    options = [*base_options(tiny_base, rows_file, root), *HELD_OUT, *SCHEDULE, "--checkpoint.every_n_steps", "2"]
    assert main(["fit", *options]) == 0
    return root


SCHEDULE = ("--model.optimizer.schedule", "linear", "--trainer.max_steps", "4")


@pytest.fixture
def goes_on(
    run_of_two_steps: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The last line of a fit that goes on from step 2 with other options, which must be refused; ``base`` and ``rows`` may be others."""

    def run(*options: str, base: Path = tiny_base, rows: Path = rows_file) -> str:
        checkpoint = run_of_two_steps / "checkpoints" / "step-00000002.ckpt"
        command = ["fit", *base_options(base, rows, tmp_path / "run"), *HELD_OUT, *SCHEDULE, "--ckpt_path", str(checkpoint), *options]
        line = line_of(capsys, *command)
        assert not (tmp_path / "run" / "metrics.csv").exists(), "refused before anything is written"
        return line.replace(str(checkpoint), "CHECKPOINT")

    return run


END = "a resumed run keeps it; {}, or begin a new run from its adapter folder"


@pytest.mark.parametrize(
    "option, value, was, now",
    [
        ("model.lora.r", "8", "4", "8"),
        ("model.lora.alpha", "32", "16", "32"),
        ("model.lora.dropout", "0.1", "0.0", "0.1"),
        ("model.lora.target_modules", "[q_proj]", "['all-linear']", "['q_proj']"),
        ("model.quantization.double_quant", "false", "True", "False"),
        ("model.optimizer.learning_rate", "0.5", "0.01", "0.5"),
        ("model.compute", "bf16", "fp32", "bf16"),
        ("model.fused", "false", "True", "False"),
        ("data.seed", "1", "42", "1"),
        ("data.global_batch_size", "2", "4", "2"),
        ("data.packing", "true", "False", "True"),
        ("trainer.gradient_clip_val", "1.0", "0.3", "1.0"),
    ],
)
def test_an_option_that_differs(goes_on: Callable[..., str], option: str, value: str, was: str, now: str) -> None:
    line = re.escape(f"{option} was {was} in the run of CHECKPOINT and is {now} now: a resumed run keeps it; set --{option} ")
    assert re.fullmatch(line + ".*, or begin a new run from its adapter folder", goes_on(f"--{option}", value))


def test_the_way_out_is_an_option_that_works(goes_on: Callable[..., str]) -> None:
    """Its value is written as the command line reads it."""
    assert '; set --model.lora.target_modules ["all-linear"], or' in goes_on("--model.lora.target_modules", "[q_proj]")
    assert "; set --data.packing false, or" in goes_on("--data.packing", "true")


def test_a_template_that_differs(goes_on: Callable[..., str]) -> None:
    expected = "data.dataset.template was chatml in the run of CHECKPOINT and is alpaca now: "
    assert goes_on("--data.dataset.template", "alpaca") == expected + END.format('set --data.dataset.template "chatml"')


def test_the_end_of_a_schedule_that_differs(goes_on: Callable[..., str]) -> None:
    way_out = "the schedule ends there, so set trainer.max_steps and trainer.max_epochs as they were"
    assert goes_on("--trainer.max_steps", "3") == "last step was 4 in the run of CHECKPOINT and is 3 now: " + END.format(way_out)


def test_rows_that_differ(goes_on: Callable[..., str], rows_file: Path, tmp_path: Path) -> None:
    """One letter of one training row; as many rows as before."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for row in rows:
        row["output"] = row["output"].replace("so", "to")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert re.match(r"training rows was 18 \([0-9a-f]{16}\) in the run of CHECKPOINT and is 18 \([0-9a-f]{16}\) now: ", goes_on(rows=other))


def test_held_out_rows_that_differ(goes_on: Callable[..., str], rows_file: Path) -> None:
    line = goes_on("--data.dataset.validation_path", str(rows_file))
    assert re.match(r"training rows was 18 .* is 22 ", line)  # none of the training file is held out any more


def test_a_tokenizer_that_differs(goes_on: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    """The same weights; one more token that no row uses."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["<never>"] = len(tokenizer["model"]["vocab"])
    file.write_text(json.dumps(tokenizer))
    assert goes_on(base=base).startswith("tokenizer was ")


def test_what_may_differ(run_of_two_steps: Path, tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Microbatches, checkpointing, workers, logging, and the places of files with the same content."""
    base = shutil.copytree(tiny_base, tmp_path / "moved")
    rows = shutil.copy(rows_file, tmp_path / "moved.jsonl")
    allowed = {
        "trainer.accumulate_grad_batches": 4,
        "trainer.strategy.gradient_checkpointing": "full",
        "trainer.log_every_n_steps": 2,
        "data.num_proc": 1,
        "data.eval_batch_size": 1,
        "checkpoint.every_n_steps": 1,
        "ckpt_path": run_of_two_steps / "checkpoints" / "step-00000002.ckpt",
    }
    options = [part for name, value in allowed.items() for part in (f"--{name}", str(value))]
    assert main(["fit", *base_options(base, Path(rows), tmp_path / "run"), *HELD_OUT, *SCHEDULE, *options]) == 0


def test_a_stream_may_go_further_from_another_place(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    stream = ("--data.streaming", "true", "--ckpt_path", "last")
    assert main(["fit", *base_options(tiny_base, rows_file, tmp_path / "run"), *stream, "--trainer.max_steps", "2"]) == 0
    moved = Path(shutil.copy(rows_file, tmp_path / "moved.jsonl"))
    assert main(["fit", *base_options(tiny_base, moved, tmp_path / "run"), *stream, "--trainer.max_steps", "3"]) == 0


def test_another_version_is_a_warning(
    run_of_two_steps: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on."""
    checkpoint: dict[str, Any] = torch.load(run_of_two_steps / "checkpoints" / "step-00000002.ckpt", weights_only=True)
    checkpoint["qlora_lightning"]["environment"] |= {"torch": "1.13", "device": "2 x NVIDIA H200"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    command = [*base_options(tiny_base, rows_file, tmp_path / "run"), *HELD_OUT, *SCHEDULE, "--ckpt_path", str(tmp_path / "old.ckpt")]
    assert main(["fit", *command]) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if "wrote the checkpoint" in line)
    assert f"torch 1.13 -> {torch.__version__.partition('+')[0]}" in warning and "device 2 x NVIDIA H200 -> CPU with 1 threads" in warning


def test_equal_environments_say_nothing() -> None:
    assert different_environment({"torch": "2.13"}, {"torch": "2.13"}) is None


def test_what_a_reader_does_not_ask_is_not_compared() -> None:
    """``validate`` asks for the model alone."""
    check_manifest({"base model": "a", "data.seed": 1}, {"base model": "a"}, "x.ckpt")
