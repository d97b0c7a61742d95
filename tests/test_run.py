"""What a run says, writes and logs."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
import yaml
from running import base_options, read_metrics
from test_loggers import config_of, history_of, offline_records

from qlora_lightning.cli import main

CONTRACT = {
    "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/supervised_fraction",
    "val/loss", "val/perplexity", "memory/peak_gib",
}  # fmt: skip


def test_run_folder_plan_and_summary(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = fit("data.dataset.validation_size=4", "samples.count=2", "samples.max_new_tokens=4", "trainer.accumulate_grad_batches=2")
    said = " ".join(capsys.readouterr().err.split())
    for text in (
        "Plan of the run",
        "18 examples",
        "4 rows a step = 2 x 2",
        "5 = 1.00 epochs of 5",
        "linear layers",
        "Held-out loss before training",
        "before training ┃ after training",
        "step 5/5",
        f"Adapter: {root}/checkpoints/last",
        f"Talk to it: qlora-lightning chat {root}/checkpoints/last",
    ):
        assert text in said, text
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert config["model"]["lora"]["r"] == 4
    assert set(read_metrics(root)[0]) >= CONTRACT


def test_training_lowers_the_held_out_loss(fit: Callable[..., Path], rows_file: Path) -> None:
    root = fit(f"data.dataset.validation_path={rows_file}", "trainer.max_epochs=10", "model.lora.r=16")
    held_out = [float(row["val/loss"]) for row in read_metrics(root) if row["val/loss"]]
    assert len(held_out) == 11
    assert held_out[-1] < 0.85 * held_out[0]


def test_offline_wandb_run_holds_configuration_and_every_metric(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read back from the file that W&B wrote."""
    wandb.finish()  # an earlier test's run in this process would be gone on with
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = [option for option in base_options(tiny_base, rows_file, tmp_path / "run") if option not in ("--trainer.logger", "false")]
    assert main(["fit", *options, "--data.dataset.validation_size", "4", "--trainer.max_steps", "2"]) == 0
    (records,) = offline_records(tmp_path / "run")
    assert config_of(records)["model"]["lora"]["r"] == 4
    assert set().union(*history_of(records)) >= CONTRACT
    assert f"upload with: wandb sync {tmp_path / 'run' / 'wandb'}" in capsys.readouterr().err


def test_recipe_gives_the_run_folder_its_name(tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = base_options(tiny_base, rows_file, Path("unused"))
    options = options[: options.index("--trainer.default_root_dir")]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("trainer: {max_steps: 1}\n")
    assert main(["fit", "--config", str(recipe), *options]) == 0
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "last.ckpt").is_file()


def test_wheel_carries_recipes_data_modules_and_defaults(tmp_path: Path) -> None:
    """What an installation without a checkout has: unpacked elsewhere, it finds its recipes."""
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(root)]
    subprocess.run(build, check=True, capture_output=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    code = "from qlora_lightning.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "recipes"]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    listed = subprocess.run([*command, "list"], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {path.stem for path in (root / "recipes").glob("*.yaml")}
    subprocess.run([*command, "copy", "quickstart", "copied"], check=True, capture_output=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "copied" / "datamodules" / "quickstart" / "train.jsonl").is_file()


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "chat", "generate", "recipes", "doctor"):
        assert f"\n  {command}" in overview
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "options:" in capsys.readouterr().out
