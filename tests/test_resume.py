"""A run that is interrupted and resumed is the run that was not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import read_metrics

from qlora_lightning.cli import main

# 18 rows: two epochs of five steps, the last of each short, with dropout, a falling learning rate and validation inside each epoch
OPTIONS = (
    "model.lora.dropout=0.1",
    "model.optimizer.schedule=cosine",
    "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2",
    "validation.every_n_steps=4",
    "data.dataset.validation_size=4",
)
EVERY_STEP = ("checkpoint.every_n_steps=1", "checkpoint.keep=20")


def losses(root: Path) -> list[tuple[str, str, str]]:
    """Step, loss and gradient norm as written, to the last digit."""
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in read_metrics(root) if row["train/loss"]]


def validations(root: Path) -> list[tuple[str, str]]:
    """Step and loss of each validation."""
    return [(row["step"], row["val/loss"]) for row in read_metrics(root) if row.get("val/loss")]


@pytest.fixture
def whole(fit: Callable[..., Path]) -> Path:
    """A run from beginning to end, with every step kept."""
    root = fit(*OPTIONS, *EVERY_STEP, folder="whole")
    assert len(losses(root)) == 10
    assert [step for step, _ in validations(root)] == ["0", "3", "7", "9"]  # before training, after steps 4 and 8, and at the end
    return root


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(fit: Callable[..., Path], whole: Path, stop_at: int) -> None:
    """From a step inside the first epoch, at a validation, at the end of an epoch (a short step) and inside the second."""
    resumed = fit(*OPTIONS, f"ckpt_path={whole}/checkpoints/step-{stop_at:08d}.ckpt", folder="resumed")
    assert losses(resumed) == losses(whole)[stop_at:]
    assert validations(resumed) == [row for row in validations(whole) if int(row[0]) >= stop_at]
    mine, reference = (torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for root in (resumed, whole))
    assert all(torch.equal(mine[key], reference[key]) for key in reference)


def test_resumed_from_best_equals_the_uninterrupted_one(fit: Callable[..., Path]) -> None:
    """`best` is written inside a validation, here that of step 4 inside the first epoch."""
    constant = [option for option in OPTIONS if "schedule" not in option]
    whole = fit(*constant, folder="whole")
    parts = fit(*constant, "trainer.max_steps=4", folder="parts")
    assert torch.load(parts / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 4
    resumed = fit(*constant, f"ckpt_path={parts}/checkpoints/best.ckpt", folder="resumed")
    assert losses(resumed) == losses(whole)[4:]


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_a_run_that_max_steps_ended_goes_on_where_it_stood(fit: Callable[..., Path], stop_at: int) -> None:
    """With the default interval of saving, which leaves the end of the run alone; a constant rate, as a schedule knows the last step."""
    constant = [option for option in OPTIONS if "schedule" not in option]
    whole = fit(*constant, folder="whole")
    fit(*constant, f"trainer.max_steps={stop_at}", folder="parts")
    parts = fit(*constant, "ckpt_path=last", folder="parts")
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accumulation_may_change_on_resume(fit: Callable[..., Path], accumulate: int) -> None:
    """The steps are the same, in other microbatches: what a user is told to do when memory runs out."""
    options = [option for option in OPTIONS if "accumulate" not in option and "dropout" not in option]
    whole = fit(*options, "trainer.accumulate_grad_batches=2", *EVERY_STEP, folder="whole")
    checkpoint = whole / "checkpoints" / "step-00000003.ckpt"
    resumed = fit(*options, f"trainer.accumulate_grad_batches={accumulate}", f"ckpt_path={checkpoint}", folder="resumed")
    assert [row[0] for row in losses(resumed)] == [row[0] for row in losses(whole)[3:]]
    mine, reference = ([float(row[1]) for row in losses(root)] for root in (resumed, whole))
    assert mine == pytest.approx(reference[3:], rel=1e-3)


def test_optimizer_settings_may_not_change_on_resume(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    fit(*OPTIONS, "trainer.max_steps=2")
    with pytest.raises(AssertionError):
        fit(*OPTIONS, "ckpt_path=last", "model.optimizer.learning_rate=0.5")
    assert "model.optimizer.learning_rate was 0.01 in the run of" in capsys.readouterr().err


def test_last_adapter_carries_the_metrics_of_its_own_step(fit: Callable[..., Path]) -> None:
    root = fit(*OPTIONS, "trainer.max_steps=7")
    metadata = json.loads((root / "checkpoints" / "last" / "qlora_lightning.json").read_text())
    assert metadata["step"] == 7
    assert metadata["metrics"]["val/loss"] == pytest.approx(float(validations(root)[-1][1]))
    assert validations(root)[-1][0] == "6"


def test_overwrite_deletes_nothing_until_the_new_run_begins(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = fit("trainer.max_steps=1")
    kept = sorted(path.name for path in root.rglob("*"))
    mistakes = (
        "data.dataset.path=none.jsonl",
        "model.base_model=./none",
        "model.lora.target_modules=[nothing]",
        f"ckpt_path={root}/checkpoints/last",
        "data.streaming=true data.dataset.max_length=5",
    )
    for broken in mistakes:
        with pytest.raises(AssertionError):
            fit("trainer.max_steps=1", "overwrite=true", *broken.split())
        assert sorted(path.name for path in root.rglob("*")) == kept
    assert "--overwrite would delete the run" in capsys.readouterr().err


def test_checkpoint_of_another_run_does_not_mix_with_the_folders_own(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    first = fit("trainer.max_steps=2", folder="first")
    fit("trainer.max_steps=1", folder="second")
    with pytest.raises(AssertionError):
        fit("trainer.max_steps=4", f"ckpt_path={first}/checkpoints/last.ckpt", folder="second")
    assert "holds an earlier run" in capsys.readouterr().err


def test_a_finished_run_that_is_resumed_changes_nothing(fit: Callable[..., Path]) -> None:
    root = fit("trainer.max_steps=2")
    before = (root / "metrics.csv").read_text()
    fit("trainer.max_steps=2", "ckpt_path=last")
    assert (root / "metrics.csv").read_text() == before


def test_last_without_a_checkpoint_begins_at_the_beginning(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = fit("trainer.max_steps=1", "ckpt_path=last")
    assert len(losses(root)) == 1
    assert "beginning at the beginning" in capsys.readouterr().err


def test_a_new_run_does_not_overwrite_an_old_one(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = fit("trainer.max_steps=1")
    with pytest.raises(AssertionError):
        fit("trainer.max_steps=1")
    assert f"run folder {root} holds an earlier run; continue it with --ckpt_path last" in capsys.readouterr().err
    fit("trainer.max_steps=1", "overwrite=true")


def test_validate_scores_checkpoint_and_adapter_folder_alike(
    fit: Callable[..., Path], tiny_base: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both give the loss that training logged after its last step."""
    from running import base_options

    root = fit(f"data.dataset.validation_path={rows_file}")
    logged = float([row["val/loss"] for row in read_metrics(root) if row["val/loss"]][-1])
    capsys.readouterr()
    for path in ("last", "best", root / "checkpoints" / "last", root / "checkpoints" / "last.ckpt"):
        options = [*base_options(tiny_base, rows_file, root), "--data.dataset.validation_path", str(rows_file)]
        assert main(["validate", *options, "--ckpt_path", str(path), "--json", "true"]) == 0
        assert json.loads(capsys.readouterr().out)["val/loss"] == pytest.approx(logged, rel=1e-6)


def test_a_run_killed_after_its_last_save_gets_what_comes_after_it(fit: Callable[..., Path]) -> None:
    """The answers after training, and the end of deleting an old checkpoint: such a run has no step left to take."""
    options = ("data.dataset.validation_size=2", "samples.count=1", "samples.max_new_tokens=2", "checkpoint.every_n_steps=1")
    root = fit(*options, "trainer.max_steps=3")
    samples, checkpoints = root / "samples.jsonl", root / "checkpoints"
    whole = samples.read_text()
    samples.write_text(whole.splitlines(keepends=True)[0])
    (checkpoints / "step-00000001").mkdir()
    (checkpoints / "step-00000001" / "recipe.yaml").touch()
    fit(*options, "trainer.max_steps=3", "ckpt_path=last")
    assert samples.read_text() == whole
    assert sorted(path.name for path in checkpoints.glob("step-*.ckpt")) == ["step-00000002.ckpt", "step-00000003.ckpt"]
    assert not (checkpoints / "step-00000001").exists()
