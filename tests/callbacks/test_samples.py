"""Answers to the same held-out prompts, again and again: what is kept of them, and that training does not notice."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import wandb
from running import base_options, read_metrics

from qlora_lightning.callbacks.monitor import Monitor, between_steps
from qlora_lightning.callbacks.samples import Samples
from qlora_lightning.cli import main
from qlora_lightning.errors import UserError
from qlora_lightning.module import QLoRAModule

# 18 rows to train on: five steps, the last of them short, with dropout
RUN = ("model.lora.dropout=0.1", "trainer.accumulate_grad_batches=2", "data.dataset.validation_size=4")
ANSWERS = ("samples.count=3", "samples.max_new_tokens=6")


def samples_of(root: Path) -> list[dict[str, Any]]:
    with (root / "samples.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def steps_of(root: Path) -> list[int]:
    """The steps of the file, each once."""
    return list(dict.fromkeys(row["step"] for row in samples_of(root)))


def test_the_same_prompts_are_answered_before_during_and_after_training(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = fit(*RUN, *ANSWERS, "samples.every_n_steps=2", "data.eval_batch_size=2", "trainer.max_epochs=2")
    rows = samples_of(root)
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4, 6, 8, 10) for _ in range(3)]  # at 10 once, though it is the end
    for row in rows[3:]:
        assert list(row) == ["step", "prompt", "generation", "reference"]
        assert (row["prompt"], row["reference"]) in [(first["prompt"], first["reference"]) for first in rows[:3]]
    assert [row["generation"] for row in rows[:3]] != [row["generation"] for row in rows[-3:]]
    said = " ".join(capsys.readouterr().err.split())
    for text in (
        "before training ┃ after training ┃ reference",
        "Answered 3 held-out prompts after step 2",
        f"Samples: {root}/samples.jsonl",
    ):
        assert text in said, text


def test_without_an_interval_they_are_answered_before_and_after(fit: Callable[..., Path]) -> None:
    root = fit(*RUN, *ANSWERS)
    assert steps_of(root) == [0, 5]
    fit(*RUN, "trainer.max_steps=1", "overwrite=true")  # a new run leaves no answers of an old one
    assert not (root / "samples.jsonl").exists()


def test_answers_change_nothing_of_training(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and the adapter are those of a run without, bit for bit, dropout included; every layer trains in every step."""
    modes: list[bool] = []
    original = QLoRAModule.training_step

    def training_step(self: QLoRAModule, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        modes.append(all(part.training for part in self.modules()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(QLoRAModule, "training_step", training_step)
    roots = fit(*RUN, folder="without"), fit(*RUN, *ANSWERS, "samples.every_n_steps=1", folder="with")
    without, with_samples = ([(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(root)] for root in roots)
    assert with_samples == without
    mine, reference = (torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for root in roots)
    assert all(torch.equal(mine[key], reference[key]) for key in reference)
    assert modes and all(modes)


def test_a_resumed_run_drops_what_it_will_answer_again(fit: Callable[..., Path]) -> None:
    keep = ("checkpoint.every_n_steps=1", "checkpoint.keep=20", "samples.every_n_steps=2")
    whole = fit(*RUN, *ANSWERS, *keep, folder="whole")
    expected = samples_of(whole)
    assert steps_of(whole) == [0, 2, 4, 5]
    checkpoint = f"ckpt_path={whole}/checkpoints/step-00000002.ckpt"
    fit(*RUN, *ANSWERS, *keep, checkpoint, "trainer.max_steps=3", folder="whole")
    assert steps_of(whole) == [0, 2, 3]
    fit(*RUN, *ANSWERS, *keep, checkpoint, folder="whole")
    assert samples_of(whole) == expected


def test_throughput_leaves_the_time_of_answers_out() -> None:
    monitor, trainer = Monitor(), MagicMock(strategy=MagicMock(root_device=torch.device("cpu")))
    trainer.callbacks = [Samples(), monitor]
    monitor.on_train_start(trainer, MagicMock())
    began = time.perf_counter()
    with between_steps(trainer):
        time.sleep(0.2)
    assert monitor._started >= began + 0.19


def test_wandb_has_one_table_that_grows(tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each logging under the one name carries all rows so far, so that the newest is the whole."""
    wandb.finish()  # an earlier test's run in this process would be gone on with
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = tmp_path / "run"
    options = [option for option in base_options(tiny_base, rows_file, root) if option not in ("--trainer.logger", "false")]
    extra = [
        part
        for option in (*RUN, *ANSWERS, "samples.every_n_steps=1", "trainer.max_steps=2")
        for part in (f"--{option.split('=')[0]}", option.split("=")[1])
    ]
    assert main(["fit", *options, *extra]) == 0
    wandb.teardown()
    tables = [json.loads(file.read_text()) for file in root.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")]
    tables.sort(key=lambda table: len(table["data"]))
    assert [len(table["data"]) for table in tables] == [3, 6, 9]
    assert tables[-1]["columns"] == ["step", "prompt", "generation", "reference"]
    assert tables[-1]["data"] == [list(row.values()) for row in samples_of(root)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2, "every_n_steps": 0}, r"samples.every_n_steps must be 1 or more, got 0; leave it out to answer before and after"),
        ({"every_n_steps": 5}, r"samples.every_n_steps 5 has nothing to answer; set samples.count to the number of prompts"),
        ({"count": -1}, r"samples.count must be 0 or more and samples.max_new_tokens 1 or more, got -1 and 64"),
    ],
)
def test_mistakes_end_in_one_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Samples(**options)


def test_samples_need_held_out_rows(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        fit("samples.count=2")
    assert "samples.count 2 needs held-out rows, and the data set has none; set data.dataset.validation_size" in capsys.readouterr().err
