"""Every YAML that ships goes through the real parser, and the paper's recipes say what the paper says."""

from pathlib import Path

import pytest

from qlora_lightning.lightning_cli import QLoRACLI, run_folder
from qlora_lightning.recipes import shared_defaults, shipped_root

RECIPES = sorted((shipped_root() / "recipes").rglob("*.yaml"))
DATAMODULES = sorted((shipped_root() / "datamodules").glob("*.yaml"))


def parse(*options: str):
    """The configuration of a fit with ``options``, parsed but not run."""

    class Parsed(QLoRACLI):
        def before_instantiate_classes(self) -> None:
            raise _Done(self.config["fit"])

    try:
        Parsed(["fit", "--config", str(shared_defaults()), *options])
    except _Done as done:
        return done.args[0]
    raise AssertionError("the parser let nothing through")


class _Done(Exception):
    pass


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_names_its_run_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("--config", str(recipe))
    assert config.trainer.strategy.class_path.endswith("QLoRAStrategy")
    monkeypatch.chdir(tmp_path)
    assert run_folder(config) == Path("runs", recipe.stem)


@pytest.mark.parametrize("file", DATAMODULES, ids=lambda path: path.stem)
def test_data_module_parses_and_says_where_its_rows_are(file: Path) -> None:
    dataset = parse("--model.base_model", "x", "--data.dataset", str(file)).data.dataset
    assert dataset.name == file.stem or file.stem == "local"
    assert dataset.path or (dataset.hub_id and dataset.hub_file and len(dataset.revision) == 40)


@pytest.mark.parametrize("name, steps, target", [("oasst1-7b", 1875, 512), ("alpaca-7b", 10_000, 128)])
def test_paper_recipes(name: str, steps: int, target: int) -> None:
    """QLoRA paper: rank 64, alpha 16, dropout 0.1, 16 rows a step, 2e-4 constant, clip 0.3, beta2 0.999, paged 32-bit AdamW."""
    config = parse("--config", str(shipped_root() / "recipes" / f"{name}.yaml"))
    assert (config.model.lora.r, config.model.lora.alpha, config.model.lora.dropout) == (64, 16, 0.1)
    optimizer = config.model.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.betas[1], optimizer.weight_decay) == (2e-4, "constant", 0.999, 0.0)
    assert (config.data.global_batch_size, config.trainer.max_steps, config.trainer.gradient_clip_val) == (16, steps, 0.3)
    assert (config.seed_everything, config.data.seed) == (0, 42)
    assert config.data.dataset.target_max_length == target
    policy = config.trainer.strategy.init_args
    assert (policy.paged_optimizer, policy.optimizer_bits, policy.gradient_checkpointing) == (True, 32, "full")


def test_command_line_wins_over_recipe_and_recipe_over_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "model: {base_model: a, lora: {r: 8}}\ntrainer: {max_steps: 5, gradient_clip_val: 1.0}\ndata: {dataset: {path: x.jsonl}}\n"
    )
    second.write_text("trainer: {max_steps: 6}\n")
    config = parse("--config", str(first), "--config", str(second), "--model.lora.r", "16", "--trainer.strategy.paged_optimizer", "false")
    assert (config.model.lora.r, config.trainer.max_steps, config.trainer.gradient_clip_val) == (16, 6, 1.0)
    assert config.trainer.strategy.init_args.paged_optimizer is False
    assert config.trainer.strategy.init_args.gradient_checkpointing == "full"
    assert config.data.dataset.path == str(tmp_path / "x.jsonl")


def test_defaults_of_the_working_folder_come_before_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_cli.yaml").write_text("trainer: {gradient_clip_val: 7.0}\n")
    monkeypatch.chdir(tmp_path)
    assert parse("--model.base_model", "x", "--data.dataset.path", "y.jsonl").trainer.gradient_clip_val == 7.0


def test_help_explains_every_field_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """An option of model, data, strategy, checkpoint, validation or samples without a text is a defect."""
    with pytest.raises(SystemExit):
        QLoRACLI(["fit", "--help"])
    bare = []
    for block in capsys.readouterr().out.split("\n  --")[1:]:
        option = block.split()[0]
        text = " ".join(block.split("\n\n")[0].split())
        ours = option.split(".")[0] in ("model", "data", "checkpoint", "validation", "samples", "overwrite", "json")
        if ours and "CONFIG" not in block.split("\n")[0] and len(text.split("(type:")[0].split()) < 5:
            bare.append(text)
    assert bare == []
