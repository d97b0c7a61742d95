"""A run that is interrupted and resumed is the run that was not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import read_metrics

from qlora_lightning.cli import main

# two epochs of six steps (the last one short), dropout, a falling learning rate, validation inside each epoch
OPTIONS = (
    "model.lora.dropout=0.1",
    "model.optimizer.schedule=cosine",
    "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2",
    "validation.every_n_steps=4",
    "checkpoint.every_n_steps=1",
    "checkpoint.keep=20",
    "data.dataset.validation_size=2",
)


def losses(root: Path) -> list[tuple[str, str, str]]:
    """Step, loss and gradient norm as written, to the last digit."""
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in read_metrics(root) if row["train/loss"]]


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(fit: Callable[..., Path], stop_at: int) -> None:
    """Stopped inside the first epoch, at a validation, at the end of an epoch and inside the second."""
    whole = fit(*OPTIONS, folder="whole")
    fit(*OPTIONS, f"trainer.max_steps={stop_at}", folder="parts")
    parts = fit(*OPTIONS, "ckpt_path=last", folder="parts")
    assert len(losses(whole)) == 10
    # the first part ended by max_steps, so its schedule is shorter than the whole run's: compare what the resumed part did
    assert [row[0] for row in losses(parts)] == [row[0] for row in losses(whole)]
    resumed = fit(*OPTIONS, f"ckpt_path={whole}/checkpoints/step-{stop_at:08d}.ckpt", folder="resumed")
    assert losses(resumed) == losses(whole)[stop_at:]
    for name in ("last.ckpt", f"step-{10:08d}.ckpt"):
        mine, reference = (torch.load(root / "checkpoints" / name, weights_only=True)["state_dict"] for root in (resumed, whole))
        assert all(torch.equal(mine[key], reference[key]) for key in reference)


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
    import json

    from running import base_options

    root = fit(f"data.dataset.validation_path={rows_file}")
    logged = float([row["val/loss"] for row in read_metrics(root) if row["val/loss"]][-1])
    capsys.readouterr()
    for path in ("last", "best", root / "checkpoints" / "last", root / "checkpoints" / "last.ckpt"):
        options = [*base_options(tiny_base, rows_file, root), "--data.dataset.validation_path", str(rows_file)]
        assert main(["validate", *options, "--ckpt_path", str(path), "--json", "true"]) == 0
        assert json.loads(capsys.readouterr().out)["val/loss"] == pytest.approx(logged, rel=1e-6)
