"""Every YAML that ships goes through the real parser, and the paper's recipes say what the paper says."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from qlora_lightning.lightning_cli import QLoRACLI, resolve_names
from qlora_lightning.recipes import shared_defaults, shipped_root
from qlora_lightning.run_folder import run_folder

RECIPES = sorted((shipped_root() / "recipes").rglob("*.yaml"))
DATAMODULES = sorted((shipped_root() / "datamodules").glob("*.yaml"))


class Row(NamedTuple):
    """One row of the paper's table of hyperparameters."""

    batch: int
    learning_rate: float
    steps: int
    source: int | None
    target: int


# QLoRA (arXiv 2305.14314), hyperparameters by size and instruction set; OTHERS are the sets without a row of their own.
SETS = ("oasst1", "hh-rlhf", "alpaca", "flan-v2", "self-instruct", "unnatural-instructions", "chip2", "longform")
OTHERS = "others"
PAPER = {
    ("7b", OTHERS): Row(16, 2e-4, 10_000, 384, 128),
    ("7b", "oasst1"): Row(16, 2e-4, 1_875, None, 512),
    ("7b", "hh-rlhf"): Row(16, 2e-4, 10_000, None, 768),
    ("7b", "longform"): Row(16, 2e-4, 4_000, 512, 1_024),
    ("13b", OTHERS): Row(16, 2e-4, 10_000, 384, 128),
    ("13b", "oasst1"): Row(16, 2e-4, 1_875, None, 512),
    ("13b", "hh-rlhf"): Row(16, 2e-4, 10_000, None, 768),
    ("13b", "longform"): Row(16, 2e-4, 4_000, 512, 1_024),
    ("33b", OTHERS): Row(32, 1e-4, 5_000, 384, 128),
    ("33b", "oasst1"): Row(16, 1e-4, 1_875, None, 512),
    ("33b", "hh-rlhf"): Row(32, 1e-4, 5_000, None, 768),
    ("33b", "longform"): Row(32, 1e-4, 2_343, 512, 1_024),
    ("65b", OTHERS): Row(64, 1e-4, 2_500, 384, 128),
    ("65b", "oasst1"): Row(16, 1e-4, 1_875, None, 512),
    ("65b", "hh-rlhf"): Row(64, 1e-4, 2_500, None, 768),
    ("65b", "longform"): Row(32, 1e-4, 2_343, 512, 1_024),
}
BASES = {"7b": "huggyllama/llama-7b", "13b": "huggyllama/llama-13b", "33b": "huggyllama/llama-30b", "65b": "huggyllama/llama-65b"}
DROPOUT = {"7b": 0.1, "13b": 0.1, "33b": 0.05, "65b": 0.05}


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


@cache
def parse_recipe(path: Path):
    """The configuration of a recipe alone; parsed once, as parsing is most of what these tests do."""
    return parse("--config", str(path))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_names_its_run_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_recipe(recipe)
    assert config.trainer.strategy.class_path.endswith("QLoRAStrategy")
    assert config.data.dataset.path or config.data.dataset.hub_id
    assert config.data.global_batch_size % config.trainer.accumulate_grad_batches == 0
    monkeypatch.chdir(tmp_path)
    assert run_folder(config) == Path("runs", recipe.stem)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short_and_begins_with_its_description(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 16


@pytest.mark.parametrize("file", DATAMODULES, ids=lambda path: path.stem)
def test_data_module_parses_and_says_where_its_rows_are(file: Path) -> None:
    dataset = parse("--model.base_model", "x", "--data.dataset", str(file)).data.dataset
    assert dataset.name == file.stem or file.stem == "local"
    assert dataset.path or (dataset.hub_id and dataset.hub_file and dataset.revision)
    assert dataset.validation_path or dataset.validation_hub_file or dataset.validation_size


@pytest.mark.parametrize("name", SETS)
def test_public_set_is_pinned_or_says_that_it_is_not_and_names_rows_and_licence(name: str) -> None:
    text = (shipped_root() / "datamodules" / f"{name.replace('-', '_')}.yaml").read_text(encoding="utf-8")
    for word in ("Source", "Rows", "Licence", "Size", "Offline", "Paper"):
        assert re.search(rf"^# {word}: +\S", text, re.MULTILINE), f"{name}: no comment line '# {word}: ...'"
    pinned = re.fullmatch("[0-9a-f]{40}", yaml.safe_load(text)["revision"])
    assert bool(pinned) != ("Not a pinned commit" in text)


@pytest.mark.parametrize("size", BASES)
@pytest.mark.parametrize("name", SETS)
def test_paper_recipe(name: str, size: str) -> None:
    """Base, batch, learning rate, steps, lengths and dropout are the table's; all else is the same for all 32."""
    config = parse_recipe(shipped_root() / "recipes" / f"{name}-{size}.yaml")
    dataset, model, optimizer, trainer = config.data.dataset, config.model, config.model.optimizer, config.trainer
    assert dataset.name == name.replace("-", "_")
    assert (model.base_model, model.lora.dropout) == (BASES[size], DROPOUT[size])
    row = Row(
        config.data.global_batch_size, optimizer.learning_rate, trainer.max_steps, dataset.source_max_length, dataset.target_max_length
    )
    assert row == PAPER.get((size, name), PAPER[size, OTHERS])
    if row.source is None:  # whole conversations, cut at the end: 16 tokens and the target's length, as in the authors' scripts
        assert (dataset.max_length, dataset.truncation) == (16 + row.target, "right")
    assert (model.lora.r, model.lora.alpha) == (64, 16)
    assert (optimizer.schedule, optimizer.betas[1], optimizer.weight_decay) == ("constant", 0.999, 0.0)
    assert (model.quantization.quant_type, model.quantization.double_quant, model.compute) == ("nf4", True, "auto")
    policy = trainer.strategy.init_args
    assert (policy.paged_optimizer, policy.optimizer_bits, policy.gradient_checkpointing) == (True, 32, "auto")
    assert (trainer.gradient_clip_val, config.seed_everything, config.data.seed, config.data.group_by_length) == (0.3, 0, 42, True)
    assert 10 <= trainer.max_steps / config.validation.every_n_steps < 11
    assert config.checkpoint.every_n_steps == (500 if size in ("7b", "13b") else 200)


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if "dataset: #" in path.read_text(encoding="utf-8")], ids=lambda path: path.stem
)
def test_recipe_that_writes_a_shipped_set_differently_reads_the_same_rows(recipe: Path) -> None:
    """Such a recipe holds the set itself, as it cannot both name a data set's YAML and change one of its fields."""
    own = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]["dataset"]
    shipped = yaml.safe_load((shipped_root() / "datamodules" / f"{own['name']}.yaml").read_text(encoding="utf-8"))
    written = ("template", "max_length", "source_max_length", "target_max_length", "truncation", "oasst1_paths", "languages")
    assert {key: value for key, value in own.items() if key not in written} == {
        key: value for key, value in shipped.items() if key not in written
    }


def test_command_line_wins_over_recipe_and_recipe_over_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "model: {base_model: a, lora: {r: 8}}\ntrainer: {max_steps: 5, gradient_clip_val: 1.0}\ndata: {dataset: {path: x.jsonl}}\n"
    )
    second.write_text("trainer: {max_steps: 6}\n")
    config = parse("--config", str(first), "--config", str(second), "--model.lora.r", "16", "--trainer.strategy.paged_optimizer", "false")
    assert (config.model.lora.r, config.trainer.max_steps, config.trainer.gradient_clip_val) == (16, 6, 1.0)
    assert config.trainer.strategy.init_args.paged_optimizer is False
    assert config.trainer.strategy.init_args.gradient_checkpointing == "auto"
    assert config.data.dataset.path == str(tmp_path / "x.jsonl")


def test_a_named_set_takes_the_place_of_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged, the rows would be those of one set and the template and the limits those of the other."""
    own = tmp_path / "own.yaml"
    own.write_text("path: rows.jsonl\ntemplate: guanaco\n")
    recipe = str(shipped_root() / "recipes" / "alpaca-7b.yaml")
    second = tmp_path / "second.yaml"
    second.write_text("data: {dataset: own.yaml}\n")
    monkeypatch.chdir(tmp_path)
    for options in (["--data.dataset", str(own)], [f"--data.dataset={own}"], ["--data.dataset", "own.yaml"], ["--config", str(second)]):
        _, *resolved = resolve_names(["fit", "--config", recipe, *options])
        dataset = parse(*resolved).data.dataset
        assert (dataset.name, dataset.hub_id, dataset.template) == ("", None, "guanaco")
        assert (dataset.source_max_length, dataset.target_max_length, dataset.validation_size) == (None, None, 0)
    _, *resolved = resolve_names(["fit", "--config", recipe, "--data.dataset.template", "guanaco"])
    assert parse(*resolved).data.dataset.target_max_length == 128  # a field alone changes that field


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
