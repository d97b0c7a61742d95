"""What ends a run from outside: the step ends, is saved, and the run goes on as if nothing had been; the last line says how."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import base_options

from qlora_lightning.cli import main
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.interruption import command_line, resuming
from qlora_lightning.module import QLoRAModule

# 18 rows, 4 held out: two epochs of five steps of two microbatches, dropout, validations inside and at the end of each epoch
OPTIONS = {
    "model.lora.dropout": "0.1",
    "trainer.max_epochs": "2",
    "trainer.accumulate_grad_batches": "2",
    "validation.every_n_steps": "4",
    "data.dataset.validation_size": "4",
    "data.eval_batch_size": "2",
}
TIMED = ("train/tokens_per_second", "memory/peak_gib")


def fit_in(root: Path, base: Path, rows: Path, *options: str) -> int:
    """Run ``fit`` in this process; give its exit code. Options are ``name=value`` strings."""
    given = OPTIONS | dict(option.split("=", 1) for option in options)
    try:
        return main(["fit", *base_options(base, rows, root), *(part for name, value in given.items() for part in (f"--{name}", value))])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def start(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., int]:
    """Run ``fit`` in the folder ``run`` of ``tmp_path``."""
    return lambda *options: fit_in(tmp_path / "run", tiny_base, rows_file, *options)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert fit_in(root, tiny_base, rows_file) == 0
    return root


def signal_in(monkeypatch: pytest.MonkeyPatch, step: str, at: int, *numbers: signal.Signals) -> None:
    """Send signals to this process inside the ``at``-th call of a step of the module."""
    real, calls = getattr(QLoRAModule, step), 0

    def sending(self: QLoRAModule, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            for number in numbers:
                signal.raise_signal(number)
        return real(self, *args)

    monkeypatch.setattr(QLoRAModule, step, sending)


def rows_of(root: Path) -> list[dict[str, str]]:
    """metrics.csv without what the clock decides."""
    with (root / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


def state_of(root: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


# two validation batches each: 1 and 2 before training, 3 and 4 after step 4, 5 and 6 after step 8, 7 and 8 after step 10
MOMENTS = {
    "first microbatch": ("training_step", 5, 3),
    "second microbatch": ("training_step", 6, 3),
    "last step of an epoch": ("training_step", 9, 5),
    "step before a validation": ("training_step", 7, 4),
    "validation": ("validation_step", 3, 4),
    "last batch of a validation": ("validation_step", 6, 8),
    "validation of the last step": ("validation_step", 7, 10),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    start: Callable[..., int],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    moment: str,
) -> None:
    step, at, saved = MOMENTS[moment]
    with monkeypatch.context() as patch:
        signal_in(patch, step, at, signal.SIGTERM)
        assert start() == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"Stopped by SIGTERM after step {saved}, which is saved; go on with: " in line and line.endswith("--ckpt_path last")
    assert start("ckpt_path=last") == 0
    assert rows_of(tmp_path / "run") == rows_of(whole)
    mine, reference = state_of(tmp_path / "run"), state_of(whole)
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


def test_a_validation_that_is_stopped_twice_is_logged_once(
    start: Callable[..., int], whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        signal_in(patch, "validation_step", 3, signal.SIGTERM)
        assert start() == 143
    with monkeypatch.context() as patch:
        signal_in(patch, "validation_step", 1, signal.SIGTERM)
        assert start("ckpt_path=last") == 143
    assert start("ckpt_path=last") == 0
    assert rows_of(tmp_path / "run") == rows_of(whole)


def test_second_ctrl_c_ends_at_once_and_saves_nothing(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    signal_in(monkeypatch, "training_step", 6, signal.SIGINT, signal.SIGINT)
    assert start("checkpoint.every_n_steps=2") == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Stopped by Ctrl-C at once; what came after the last checkpoint runs again; go on with: " in line
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_scheduler_that_repeats_its_signal_does_not_cost_the_step(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signal_in(monkeypatch, "training_step", 6, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    assert start() == 143
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_training_a_signal_ends_the_run_at_once(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(InstructionDataModule, "setup", lambda self, stage: signal.raise_signal(number))
    before = signal.getsignal(number)
    assert start("overwrite=true") == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert "before training began; begin with: " in line and line.endswith("--overwrite true")
    assert signal.getsignal(number) == before


def test_a_run_stopped_before_its_first_step_begins_anew(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        signal_in(patch, "validation_step", 1, signal.SIGTERM)
        assert start() == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert "before there was a checkpoint; begin anew with: " in line and line.endswith("--overwrite true")
    assert start("overwrite=true") == 0


def test_the_command_that_resumes_keeps_all_but_what_belongs_to_one_start() -> None:
    given = [
        "fit",
        "--config",
        "my recipe",
        "--overwrite",
        "--ckpt_path=best",
        "--model.lora.r",
        "8",
        "--overwrite=true",
        "--ckpt_path",
        "x",
    ]
    assert resuming(given) == ["fit", "--config", "my recipe", "--model.lora.r", "8", "--ckpt_path", "last"]
    assert shlex.split(command_line(given))[-len(given) :] == given


def started(root: Path, log: Path, options: list[str], **environment: str) -> "subprocess.Popen[bytes]":
    """A fit in a process and a process group of its own, that has saved its first checkpoint."""
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *options]
    # a shell that starts jobs in the background has them ignore SIGINT
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        command, stderr=log.open("w"), env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, preexec_fn=restore, start_new_session=True
    )
    give_up = time.monotonic() + 120
    while not (root / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < give_up and process.poll() is None:
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_and_the_command_of_the_last_line(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches W&B's and the loaders' processes too. The last line, pasted into a shell, goes on."""
    root, log = tmp_path / "a run", tmp_path / "log"
    wandb = '[{"class_path": "qlora_lightning.loggers.RunWandbLogger"}]'
    options = [*base_options(tiny_base, rows_file, root), "--trainer.max_epochs", "2000", "--checkpoint.every_n_steps", "5"]
    options += ["--data.num_workers", "1", "--trainer.logger", wandb, "--overwrite", "true"]
    process = started(root, log, options, WANDB_MODE="offline")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    said = log.read_text()
    assert "Traceback" not in said and "W&B failed" not in said
    line = said.splitlines()[-1]
    assert line.startswith("Stopped by Ctrl-C after step ") and line.endswith("--ckpt_path last")
    step = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"after step {step}, which is saved" in line
    epochs = step // 6 + 1
    command = line.partition("go on with: ")[2].replace("--trainer.max_epochs 2000", f"--trainer.max_epochs {epochs}")
    subprocess.run(command, shell=True, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [int(row["step"]) for row in rows_of(root)] == list(range(epochs * 6))


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "fit",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def test_another_requeue_signal_and_an_array_of_jobs(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As Lightning's plugin has them; a ``scontrol`` that is not there is said."""
    for name, value in (SLURM | {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3", "PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    plugin = "{class_path: lightning.pytorch.plugins.environments.SLURMEnvironment, init_args: {requeue_signal: SIGUSR2}}"
    signal_in(monkeypatch, "training_step", 6, signal.SIGUSR2)
    before = signal.getsignal(signal.SIGUSR2)
    try:
        assert start(f"trainer.plugins=[{plugin}]") == 128 + signal.SIGUSR2
    finally:
        signal.signal(signal.SIGUSR2, before)
    stopped, requeue = capsys.readouterr().err.splitlines()[-2:]
    assert "Stopped by SIGUSR2 after step 3, which is saved" in stopped
    assert requeue.startswith("warning: job 9_3 is not requeued (") and requeue.endswith("; submit it again")


@pytest.mark.slow
def test_slurm_requeue_saves_our_checkpoint_requeues_and_the_next_start_goes_on(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's script is one command with ``--ckpt_path last``; SLURM sends SIGUSR1 and starts the script again."""
    root, log, tools = tmp_path / "run", tmp_path / "log", tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    (tools / "scontrol").chmod(0o755)
    slurm = SLURM | {"PATH": f"{tools}:{os.environ['PATH']}"}
    options = [*base_options(tiny_base, rows_file, root), "--checkpoint.every_n_steps", "5", "--ckpt_path", "last"]
    process = started(root, log, [*options, "--trainer.max_epochs", "2000"], **slurm)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 128 + signal.SIGUSR1
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert log.read_text().splitlines()[-1] == "Requeued job 4711"
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    step = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"Stopped by SIGUSR1 after step {step}, which is saved" in log.read_text()
    epochs = step // 6 + 1
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", *options, "--trainer.max_epochs", str(epochs)]) == 0
    assert [int(row["step"]) for row in rows_of(root)] == list(range(epochs * 6))
