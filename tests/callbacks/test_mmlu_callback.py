"""MMLU from the command line: in ``validate``, and during ``fit`` without a trace in the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
from exams import SUBJECTS, write_exam
from running import base_options, read_metrics

from qlora_lightning.cli import main


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exam(tmp_path_factory.mktemp("exam"), questions=4)


def asked(exam: Path, **options: object) -> list[str]:
    given = {"path": exam, "subjects": ",".join(SUBJECTS), "shots": 0, **options}
    return [f"--mmlu.{name}={value}" for name, value in given.items()]


def test_validate_scores_beside_the_heldout_loss(
    exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*base_options(tiny_base, rows_file, tmp_path / "run"), "--data.dataset.validation_size=4"]
    assert main(["validate", *options, *asked(exam), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert {"val/loss", "mmlu/accuracy", "mmlu/accuracy_micro", "mmlu/stem", "mmlu/humanities", "mmlu/other"} <= metrics.keys()
    document = json.loads((tmp_path / "run" / "mmlu" / "base.json").read_text())
    assert metrics["mmlu/accuracy"] == document["accuracy"]
    assert {f"mmlu/{name}" for name in SUBJECTS} <= metrics.keys()
    assert document["questions"] == 12 and document["shots"] == 0 and document["step"] is None
    assert document["subjects"]["anatomy"]["questions"] == 4
    low, high = document["accuracy_interval"]
    assert low <= document["accuracy"] <= high

    assert main(["validate", *options, *asked(exam, limit=2)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "MMLU: 6 questions, subjects: 3, examples before each: 0, answers as ' A'" in shown.err
    assert "all, mean over subjects" in shown.err and "humanities" in shown.err


@pytest.mark.parametrize("heldout", [["--trainer.limit_val_batches=0"], []], ids=["unused", "none"])
def test_mmlu_needs_no_heldout_rows(
    heldout: list[str], exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "gone.jsonl" if heldout else rows_file  # unused rows are not even looked for
    options = base_options(tiny_base, rows, tmp_path / "run")
    assert main(["validate", *options, *asked(exam), *heldout, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert "mmlu/accuracy" in metrics and "val/loss" not in metrics


def test_fit_scores_every_n_steps_and_after_the_last_and_is_not_changed_by_it(fit: Callable[..., Path], exam: Path) -> None:
    plain = fit("model.lora.dropout=0.1", folder="plain")
    options = [option.removeprefix("--") for option in asked(exam, every_n_steps=2)]
    scored = fit("model.lora.dropout=0.1", *options, folder="scored")
    trained = [[loss for row in read_metrics(root) if (loss := row["train/loss"])] for root in (plain, scored)]
    assert trained[0] == trained[1]  # to the bit, dropout included
    by_step = {int(row["step"]): row["mmlu/accuracy"] for row in read_metrics(scored) if row["mmlu/accuracy"]}
    assert list(by_step) == [1, 3, 5]  # rows count steps from 0: after steps 2, 4 and the last
    documents = [json.loads(file.read_text()) for file in sorted((scored / "mmlu").iterdir())]
    assert [document["step"] for document in documents] == [2, 4, 6]
    assert float(by_step[5]) == pytest.approx(documents[-1]["accuracy"])


def test_a_checkpoint_scores_as_the_run_did(
    fit: Callable[..., Path], exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fit(*[option.removeprefix("--") for option in asked(exam, every_n_steps=100)])
    options = base_options(tiny_base, rows_file, root)
    assert main(["validate", *options, *asked(exam), "--ckpt_path", "last", "--json"]) == 0
    capsys.readouterr()
    during, after = (json.loads((root / "mmlu" / f"{name}.json").read_text()) for name in ("step-000006", "last"))
    assert during["subjects"] == after["subjects"]


def test_wandb_has_one_table_of_fit_and_of_validate(
    exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later ``validate`` of the run's own checkpoint is added to the run that trained it."""
    wandb.finish()  # an earlier test's run in this process would be gone on with
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = tmp_path / "run"
    options = [option for option in base_options(tiny_base, rows_file, root) if option not in ("--trainer.logger", "false")]
    assert main(["fit", *options, "--trainer.max_steps=1", *asked(exam, every_n_steps=1)]) == 0
    assert main(["validate", *options, "--ckpt_path=last", *asked(exam, shots=1)]) == 0
    wandb.teardown()
    folders = sorted(root.glob("wandb/offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # the run's id
    tables = [json.loads(file.read_text()) for folder in folders for file in folder.glob("files/media/table/mmlu/*.table.json")]
    assert [table["columns"] for table in tables] == [["step", "subject", "accuracy", "low", "high", "questions"]] * 2
    assert [[row[:2] for row in table["data"]] for table in tables] == [[[step, name] for name in SUBJECTS] for step in (1, None)]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--mmlu.every_n_steps=5"], "mmlu.every_n_steps 5 needs questions; give --mmlu.path FOLDER or --mmlu.hub_id cais/mmlu"),
        (["--mmlu.every_n_steps=0", "--mmlu.hub_id=cais/mmlu"], "mmlu.every_n_steps must be at least 1, got 0; correct it or leave it out"),
        (["--mmlu.path=nowhere", "--mmlu.every_n_steps=5"], "no such file or folder; give a folder with dev/, val/ and test/"),
        (["--mmlu.shot=5"], "unknown option mmlu.shot; did you mean mmlu.shots?"),
        (["--mmlu.hub_id=cais/mmlu", "--mmlu.every_n_steps=5"], "the hub cannot be reached"),
    ],
)
def test_mistakes_end_before_the_model_loads(
    options: list[str], line: str, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *base_options(tiny_base, rows_file, tmp_path / "run"), *options]) == 2
    shown = capsys.readouterr().err
    assert line in shown.splitlines()[-1]
    assert "Loading" not in shown
