"""MMLU in a run that stops and goes on, shares its steps with samples, or begins anew: nothing lost, doubled or left behind."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from exams import write_exam
from running import base_options, read_metrics

from qlora_lightning.callbacks import progress
from qlora_lightning.callbacks.mmlu import MMLU
from qlora_lightning.cli import main
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu.scoring import MMLUTest
from qlora_lightning.interruption import Interrupted

NAMES = "anatomy,formal_logic"
RUN = ("model.lora.dropout=0.1", "data.dataset.validation_size=4", "samples.count=2", "samples.max_new_tokens=4", "samples.every_n_steps=2")
KEEP = ("checkpoint.every_n_steps=1", "checkpoint.keep=20")


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exam(tmp_path_factory.mktemp("exam"), questions=3)


def asked(exam: Path, every_n_steps: int = 2) -> tuple[str, ...]:
    return (f"mmlu.path={exam}", f"mmlu.subjects={NAMES}", "mmlu.shots=0", f"mmlu.every_n_steps={every_n_steps}")


def rows_of(root: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what the clock decides."""
    return [{name: value for name, value in row.items() if "per_second" not in name and "memory" not in name} for row in read_metrics(root)]


def documents(root: Path) -> dict[str, Any]:
    found = {file.name: json.loads(file.read_text()) for file in sorted((root / "mmlu").iterdir())}
    return {name: {key: value for key, value in one.items() if key != "seconds"} for name, one in found.items()}


def test_a_run_stopped_during_mmlu_goes_on_without_gap_or_double(
    fit: Callable[..., Path], exam: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples and MMLU share their steps here; in the middle of the second evaluation Ctrl-C comes for the second time."""
    whole = fit(*RUN, *KEEP, *asked(exam), folder="whole")
    assert list(documents(whole)) == ["step-000002.json", "step-000004.json", "step-000005.json"]
    answers, calls = MMLUTest.answers, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted(signal.SIGINT)
        return answers(*args, **options)

    monkeypatch.setattr(MMLUTest, "answers", interrupted)
    with pytest.raises(Interrupted, match="Ctrl-C"):
        fit(*RUN, *KEEP, *asked(exam), folder="stopped")
    stopped = fit(*RUN, *KEEP, *asked(exam), "ckpt_path=last", folder="stopped")
    assert rows_of(stopped) == rows_of(whole)
    assert documents(stopped) == documents(whole)
    assert (stopped / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_what_a_run_scored_beyond_its_checkpoint_is_dropped(fit: Callable[..., Path], exam: Path, tmp_path: Path) -> None:
    root = fit(*RUN, *KEEP, *asked(exam))
    (root / "mmlu" / "step-00000003.json").write_text("{}")  # a checkpoint that was validated
    fit(*RUN, *KEEP, *asked(exam, every_n_steps=100), f"ckpt_path={root}/checkpoints/step-00000003.ckpt", "trainer.max_steps=4")
    assert [file.name for file in sorted((root / "mmlu").iterdir())] == ["step-00000003.json", "step-000002.json", "step-000004.json"]
    fit(*RUN, "trainer.max_steps=1", "overwrite=true")
    assert not (root / "mmlu").exists()


def test_ctrl_c_in_validate_gives_the_terminal_back(
    exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bars(progress.Progress):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    def interrupted(self: MMLUTest, *args: Any) -> Any:
        args[-1](1, 6)
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "is_live", lambda: True)
    monkeypatch.setattr(progress, "Progress", Bars)
    monkeypatch.setattr(MMLUTest, "answers", interrupted)
    options = [f"--{option}" for option in asked(exam)[:3]]
    assert main(["validate", *base_options(tiny_base, rows_file, tmp_path / "run"), *options]) == 130
    assert len(bars) == 1 and not bars[0].live.is_started


def test_a_recipe_names_the_exam_relative_to_itself_and_the_checkpoint_is_recorded(
    fit: Callable[..., Path], exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "exam").symlink_to(exam)
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.write_text("mmlu:\n  path: ../exam\n  subjects: [anatomy, formal_logic]\n  shots: 1\n")
    root = fit(f"config={recipe}")
    assert "MMLU: left to validate; set --mmlu.every_n_steps N to score during fit too" in capsys.readouterr().err
    checkpoint = root / "checkpoints" / "last.ckpt"
    options = [*base_options(tiny_base, rows_file, root), "--config", str(recipe), "--ckpt_path", str(checkpoint)]
    assert main(["validate", *options]) == 0
    found = documents(root)["last.json"]
    assert (found["model"], found["shots"], found["split"]) == (str(checkpoint), 1, "test")
    assert found["source"] == str(tmp_path / "exam") and list(found["subjects"]) == ["anatomy", "formal_logic"]


def test_wandb_has_one_table_of_subjects(
    exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.finish()
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = tmp_path / "run"
    options = [option for option in base_options(tiny_base, rows_file, root) if option not in ("--trainer.logger", "false")]
    assert main(["fit", *options, *(f"--{option}" for option in asked(exam, 1)), "--trainer.max_steps=2"]) == 0
    wandb.teardown()
    files = sorted(root.glob("wandb/offline-run-*/files/media/table/mmlu/subjects*.table.json"))
    assert [json.loads(file.read_text())["columns"][:3] for file in files] == [["step", "subject", "accuracy"]] * 2
    assert sorted({row[0] for file in files for row in json.loads(file.read_text())["data"]}) == [1, 2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"shots": 5}, "mmlu.shots 5 needs questions; give --mmlu.path FOLDER or --mmlu.hub_id cais/mmlu"),
        ({"path": "x", "subjects": []}, "mmlu.subjects must be names with commas between, got []; correct it, or leave it out for all"),
        ({"path": "x", "subjects": "anatomy,"}, "mmlu.subjects must be names with commas between, got 'anatomy,'"),
    ],
)
def test_options_that_ask_for_nothing(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        MMLU(**options)
    assert str(error.value).startswith(line)


def test_a_prompt_longer_than_the_base_is_refused_before_it_loads(
    exam: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*(f"--{option}" for option in asked(exam)), "--mmlu.max_length=513"]
    assert main(["fit", *base_options(tiny_base, rows_file, tmp_path / "run"), *options]) == 2
    shown = capsys.readouterr().err
    assert "mmlu.max_length must be at most 512, the base model's positions, got 513" in shown and "Loading" not in shown
