"""A specification is refused before any file is read; paths count from the file that names them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser, set_parsing_settings

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

HUB = {"path": None, "hub_id": "someone/rows", "hub_file": "train.jsonl", "revision": "0123abc"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": None}, "neither path nor hub_id is given"),
        ({**HUB, "revision": None}, "data.dataset.revision must pin the commit of the hub data set someone/rows, got none"),
        ({**HUB, "hub_file": None}, "data.dataset.hub_file must name the file"),
        (
            {"template": "alpca"},
            "data.dataset.template must be one of alpaca, chatml, completion, gemma, guanaco, llama2, llama3, mistral, plain, qwen, "
            "zephyr, tokenizer; got 'alpca', nearest is alpaca",
        ),
        ({"max_length": 0}, "data.dataset.max_length must be a positive number, got 0"),
        ({"source_max_length": -1}, "data.dataset.source_max_length must be a positive number"),
        ({"target_max_length": -5}, "data.dataset.target_max_length must be a positive number"),
        ({"validation_size": -1}, "validation_size must be a number of rows or a fraction below 1, got -1"),
        ({"validation_size": 1.5}, "validation_size must be a number of rows or a fraction below 1, got 1.5"),
    ],
)
def test_what_can_never_work_is_refused_in_one_line(make_spec: Callable[..., DatasetSpec], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_spec(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DatasetSpec]:
    """Parses arguments as the command line does: a recipe in recipes/ that names a set in datamodules/, from a third folder."""
    for folder in ("recipes", "datamodules", "work"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "run.yaml").write_text("data: {dataset: ../datamodules/x.yaml, base_model: tiny}\n")
    (tmp_path / "datamodules" / "x.yaml").write_text("path: sub/rows.jsonl\nname: x\nvalidation_size: 0.5\nlanguages: [en, de]\n")
    monkeypatch.chdir(tmp_path / "work")

    def parsed(*arguments: str) -> DatasetSpec:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(InstructionDataModule, "data")
        return parser.instantiate(parser.parse_args(list(arguments))).data.spec

    return parsed


def test_a_path_in_a_yaml_counts_from_that_yaml(parse: Callable[..., DatasetSpec], tmp_path: Path) -> None:
    spec = parse("--config", "../recipes/run.yaml")
    assert spec.path == str(tmp_path / "datamodules" / "sub" / "rows.jsonl")
    assert (spec.name, spec.validation_size, spec.languages) == ("x", 0.5, ["en", "de"])


def test_a_path_on_the_command_line_counts_from_the_working_folder(parse: Callable[..., DatasetSpec], tmp_path: Path) -> None:
    spec = parse("--config", "../recipes/run.yaml", "--data.dataset.path", "other.jsonl")
    assert spec.path == str(tmp_path / "work" / "other.jsonl")
    assert spec.name == "x"


def test_a_set_can_be_named_on_the_command_line(parse: Callable[..., DatasetSpec], tmp_path: Path) -> None:
    spec = parse("--data.base_model", "tiny", "--data.dataset", "../datamodules/x.yaml", "--data.dataset.path", "~/mine.jsonl")
    assert spec.path == os.path.expanduser("~/mine.jsonl")  # noqa: PTH111


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser()
    parser.add_class_arguments(InstructionDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The most tokens before the first answer." in text
    assert "Make up steps of examples of like length." in text


SHIPPED = sorted(Path(__file__).parents[2].joinpath("datamodules").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_set_parses(parse: Callable[..., DatasetSpec], path: Path) -> None:
    assert parse("--data.base_model", "tiny", "--data.dataset", str(path)).name == path.stem
