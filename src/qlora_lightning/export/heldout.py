"""The rows that a merge is measured on: those that the run itself held out, or a file of the user's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.dataset import IGNORED, TokenizedDataset
from qlora_lightning.data.sets import InstructionSet
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.texts import ROW_ENDINGS, read_texts
from qlora_lightning.evaluation.windows import encode
from qlora_lightning.export.evidence import Row
from qlora_lightning.machine import usable_cores
from qlora_lightning.modeling.sources import first_line

RECIPE_FILE = "recipe.yaml"
WINDOW = 512
"""Tokens of a row that is cut out of a text."""
_GIVE = "give held-out rows or a text with --rows FILE"


class Heldout(NamedTuple):
    """Rows, and where they are from."""

    rows: list[Row]
    source: str


def heldout_of_run(adapter: Path, metadata: Mapping[str, Any], tokens: int) -> Heldout:
    """Rows that the adapter's own run held out, drawn by a fixed seed until so many tokens are scored.

    Args:
        adapter: The adapter folder, which holds the run's configuration.
        metadata: The adapter's.
        tokens: Scored tokens wanted; all where there are fewer.

    Raises:
        UserError: the configuration or the data is not there, the data has changed since, or the run held nothing out.
    """
    if not (adapter / RECIPE_FILE).is_file():
        raise UserError(f"a merge is measured on held-out rows, but {adapter} holds no {RECIPE_FILE} that says which; {_GIVE}")
    try:
        data = _data_module(adapter / RECIPE_FILE)
        data.heldout = "optional"
        data.setup("fit")
        known = data.metadata()["data"]["fingerprint"]
    except UserError as error:
        raise UserError(f"the rows that {adapter} was trained on cannot be read ({error}); {_GIVE}") from error
    if data.val_set is None:
        raise UserError(f"a merge is measured on held-out rows, but the run of {adapter} held none out; {_GIVE}")
    if known != (trained := metadata["data"]["fingerprint"]):
        raise UserError(
            f"the training rows of {adapter} have changed since (fingerprint {known[:16]}, not {trained[:16]}), so that "
            f"rows held out now may have been trained on; {_GIVE}"
        )
    return Heldout(_drawn(data.val_set, tokens), "held-out rows of the run")


def heldout_of_file(file: Path, tokenizer: PreTrainedTokenizerFast, style: Mapping[str, Any], tokens: int) -> Heldout:
    """Rows of a file, as ``heldout_of_run``: instruction rows of which the answers are scored, or one text of which everything is.

    Args:
        file: Instruction rows by its ending, else a text.
        tokenizer: The base's.
        style: ``template`` and ``system_prompt`` as the adapter's metadata has them; for instruction rows only.
        tokens: Scored tokens wanted; all where there are fewer.

    Raises:
        UserError: the file cannot be read, or instruction rows come without a template.
    """
    if not file.is_dir() and Path(file.name.lower().removesuffix(".gz")).suffix not in ROW_ENDINGS:
        return Heldout(_windows(read_texts(file), tokenizer, tokens), f"the text {file.name}")
    if style.get("template") is None:
        raise UserError(f"{file} holds rows, and the adapter does not say how to write them out; add --template NAME, or give a .txt file")
    spec = DatasetSpec(path=DataPath(file.resolve()), template=style["template"], system_prompt=style.get("system_prompt"))
    dataset, _ = InstructionSet(spec, tokenizer, usable_cores(), seed=0).everything
    return Heldout(_drawn(dataset, tokens), f"the rows of {file.name}")


def _data_module(recipe: Path) -> InstructionDataModule:
    """The data module that a run's configuration describes; nothing else of the configuration is looked at."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InstructionDataModule, "data")
    try:
        config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        model = config["model"]
        given = {**config["data"], "base_model": model["base_model"], "base_revision": model.get("revision")}
        data = parser.instantiate_classes(parser.parse_object({"data": given})).data
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, ArgumentError) as error:
        raise UserError(f"{recipe} is not the configuration of a run: {first_line(error)}") from error
    assert isinstance(data, InstructionDataModule)
    return data


def _drawn(dataset: TokenizedDataset, tokens: int) -> list[Row]:
    rows: list[Row] = []
    left = tokens
    for number in np.random.default_rng(0).permutation(len(dataset)):
        if left <= 0:
            break
        example = dataset[int(number)]
        row = Row(example.input_ids.astype(np.int64), example.labels[1:] != IGNORED)
        if row.scored.any():
            rows.append(row)
            left -= int(row.scored.sum())
    return rows


def _windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, tokens: int) -> list[Row]:
    """Pieces of the texts, each beginning with the last token of the one before it; all but the first token of a piece is scored."""
    rows = []
    for text in encode(tokenizer, texts, tokens):
        for start in range(0, len(text.ids) - 1, WINDOW):
            ids = text.ids[start : start + WINDOW + 1].astype(np.int64)
            rows.append(Row(ids, np.ones(len(ids) - 1, np.bool_)))
    if not rows:
        raise UserError("a text to measure on must have two tokens, found none that has; give more text with --rows FILE")
    return rows
