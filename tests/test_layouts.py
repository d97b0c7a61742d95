"""Packed, mixed and streamed data through the command line: the same losses, and exact after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from running import base_options, read_metrics

from qlora_lightning.cli import main

FitRun = Callable[..., Path]


def stream_of(root: Path) -> list[tuple[str, str, str]]:
    """Step, loss and gradient norm of each training step, as written."""
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in read_metrics(root) if row["train/loss"]]


def numbers(root: Path) -> list[list[float]]:
    return [[float(value) for value in row] for row in stream_of(root)]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_packed_run_has_the_losses_and_gradients_of_the_padded_one(fit: FitRun, accumulate: int) -> None:
    """22 rows: the last step has two. Later steps agree too, so that the updates did."""
    options = (f"trainer.accumulate_grad_batches={accumulate}", "model.optimizer.learning_rate=0.001")
    padded, packed = (fit(*options, f"data.packing={packing}", folder=packing) for packing in ("false", "true"))
    assert len(numbers(padded)) == 6
    for plain, other in zip(numbers(padded), numbers(packed), strict=True):
        assert other == pytest.approx(plain, rel=1e-4)


def test_a_packed_run_resumes_bit_for_bit(fit: FitRun, tmp_path: Path) -> None:
    options = ("data.packing=true", "trainer.max_epochs=2", "checkpoint.every_n_steps=4", "checkpoint.keep=9", "model.lora.dropout=0.1")
    whole = fit(*options, folder="whole")
    resumed = fit(*options, f"ckpt_path={whole}/checkpoints/step-00000004.ckpt", folder="resumed")
    assert stream_of(resumed) == stream_of(whole)[4:]
    adapters = [(root / "checkpoints" / "last" / "adapter_model.safetensors").read_bytes() for root in (whole, resumed)]
    assert adapters[0] == adapters[1]


def test_a_streamed_run_resumes_bit_for_bit(fit: FitRun) -> None:
    options = ("data.streaming=true", "trainer.max_epochs=-1", "trainer.max_steps=9", "checkpoint.every_n_steps=4", "checkpoint.keep=9")
    whole = fit(*options, folder="whole")
    resumed = fit(*options, f"ckpt_path={whole}/checkpoints/step-00000004.ckpt", folder="resumed")
    assert len(stream_of(whole)) == 9
    assert stream_of(resumed) == stream_of(whole)[4:]


def test_a_recipe_names_the_sets_of_a_mix_by_files_beside_it(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sets").mkdir()
    for name, count in (("first", 8), ("second", 12)):
        rows = [{"prompt": f"{name} {n}", "response": "yes"} for n in range(count)]
        (tmp_path / "sets" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "sets" / f"{name}.yaml").write_text(f"path: {name}.jsonl\ntemplate: guanaco\nvalidation_size: 2\n")
    (tmp_path / "second.yaml").write_text("path: sets/second.jsonl\ntemplate: guanaco\nvalidation_size: 2\n")
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("data:\n  dataset: sets/first.yaml\n  mix:\n    - {dataset: second.yaml, weight: 0.5}\n")
    root = tmp_path / "run"
    options = base_options(tiny_base, tmp_path / "unused", root)
    place = options.index("--data.dataset.path")
    assert main(["fit", "--config", str(recipe), *options[:place], *options[place + 4 :]]) == 0
    plan = " ".join(capsys.readouterr().err.split())
    assert "first + second x 0.5: 16 examples" in plan
    assert "held out │ 4 examples" in plan
    assert len(stream_of(root)) == 3  # 6 of the first and 5 of the second, by four
