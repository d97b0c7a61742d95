"""What a user says about an instruction set: one dataclass, filled from one YAML or from the command line."""

import os
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import register_type

from qlora_lightning.data.templates import find_template
from qlora_lightning.errors import UserError

Format = Literal[
    "auto",
    "instruction",
    "prompt_response",
    "messages",
    "guanaco_text",
    "oasst1_tree",
    "oasst1_messages",
    "hh_rlhf",
    "self_instruct",
    "unnatural",
    "chip2",
]


class DataPath(str):
    """A local file, made absolute when it is parsed: relative to the YAML that names it, or to the working folder on the command line."""

    __slots__ = ()


def _absolute(value: Any) -> DataPath:
    """The parser stands in the folder of the YAML that it reads, so that ``abspath`` here means relative to that YAML."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected the path of a file, got {value!r}")
    return DataPath(os.path.abspath(os.path.expanduser(value)))  # noqa: PTH100, PTH111 - a missing file must not be resolved further


register_type(DataPath, str, _absolute)


@dataclass
class DatasetSpec:
    """One instruction set: where its rows are, which shape they have, how they are written out and how long they may be.

    Raises:
        UserError: a value that can never work, before any file is read.
    """

    name: str = ""
    """What reports and logs call this set. Empty: the local file's name, or the hub id."""
    path: DataPath | None = None
    """A local file of rows: .json, .jsonl, .csv, .tsv (each also as .gz), .parquet, .arrow, a .zip of them, or a folder of them. Takes the
    place of the hub's file where both are given. Relative to the YAML that names it; on the command line to the working folder."""
    hub_id: str | None = None
    """A Hugging Face data set, as in OpenAssistant/oasst1. Needs ``hub_file`` and ``revision``."""
    hub_file: str | list[str] | None = None
    """The file with the training rows inside the hub data set, or several that are read one after the other."""
    revision: str | None = None
    """The commit hash of the hub data set, so that the same recipe always reads the same rows."""
    validation_path: DataPath | None = None
    """A local file or folder of validation rows, of the same shape. Comes before ``validation_hub_file`` and ``validation_size``."""
    validation_hub_file: str | list[str] | None = None
    """The file or files with the validation rows inside the hub data set. Comes before ``validation_size``. Unused where ``path``
    is given."""
    validation_size: int | float = 0
    """How many rows (or, below 1, which fraction of them) are taken out of the training rows, drawn by the seed, where no validation
    file is given. 0: no validation. A fraction leaves at least one row to train on."""
    rows_per_file: int | None = None
    """Use only the first so many rows of each file. Null: all."""
    format: Format = "auto"
    """The shape of a row. ``auto`` looks at the first row's fields. instruction: instruction, input, output. prompt_response: prompt and
    response (or completion), input and output, inputs and targets. messages: a list of role and content (or from and value).
    guanaco_text: one text with ``### Human:`` and ``### Assistant:``. oasst1_tree: one message tree a row. oasst1_messages: one message of
    a tree a row. hh_rlhf: chosen (and rejected) transcripts. self_instruct: prompt and completion that ends in a literal
    ``<|endoftext|>``. unnatural: an instruction with its instances. chip2: one text with ``<human>:`` and ``<bot>:``."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that is wrong (a missing field, an unknown role, two turns of one side in a row, ...): error ends the command with a line
    that names the row, skip leaves it out and counts it. A file that is broken as such (its JSON, its CSV) always ends it."""
    compat: Literal["fixed", "paper"] = "fixed"
    """paper: what the QLoRA authors' code made of the rows, flaws included (docs/data_sets.md lists them), with ``template`` only naming
    how to prompt the result, and of the limits only those of source and target. fixed: one rendering, exact masks, every answer with its
    end token."""
    template: str = "chatml"
    """How a conversation is written out: alpaca, guanaco, plain and completion suit any base; chatml, qwen, llama2, llama3, mistral, gemma
    and zephyr the models trained with them; tokenizer is the chat template that comes with the base. Never guessed from a name."""
    system_prompt: str | None = None
    """Set before every conversation that brings no system message of its own."""
    train_on_source: bool = False
    """Train on the prompts too, not only on the answers and their end tokens."""
    max_length: int | None = None
    """The most tokens an example may have; ``truncation`` says what happens to longer ones. Null: no limit."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """For examples over ``max_length``. drop: leave them out. left: keep BOS and the end of the conversation. right: keep its beginning;
    an answer that is cut still ends with its end token. All are counted in the report."""
    source_max_length: int | None = None
    """The most tokens before the first answer. The prompt's text is cut at its end; the mark that opens the answer stays."""
    target_max_length: int | None = None
    """The most tokens from the first answer on. Cut at the right; an answer that is cut still ends with its end token."""
    languages: list[str] | None = None
    """OASST1 only: keep messages in these languages (as the rows spell them: en, es, ...). Null: all."""
    oasst1_paths: Literal["best", "all"] = "best"
    """OASST1 only. best: the best-ranked reply at every level, one conversation a tree, as in the paper. all: every path."""
    reformulations: bool = True
    """unnatural only: use the reworded instructions (of the set's full edition) too."""

    def __post_init__(self) -> None:
        """Checks each value once; everything behind trusts them."""
        self.name = self.name or (Path(self.path).stem if self.path else self.hub_id or "")
        self._check_source()
        find_template(self.template, "data.dataset.template")
        for name in ("max_length", "source_max_length", "target_max_length", "rows_per_file"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"data.dataset.{name} must be a positive number, got {value}; use null for no limit")
        if self.compat == "paper" and self.system_prompt is not None:
            raise UserError(
                f"data.dataset.compat paper sets no system prompt, got {self.system_prompt!r}; leave system_prompt out or set compat: fixed"
            )
        size = self.validation_size
        if not (0 <= size < 1 or (isfinite(size) and size > 0 and size == int(size))):
            raise UserError(
                f"data.dataset.validation_size must be a number of rows or a fraction below 1, got {size}; 0 means no validation"
            )

    def _check_source(self) -> None:
        if self.path is None and self.hub_id is None:
            raise UserError(
                "a data set needs rows, but neither path nor hub_id is given; "
                "name a YAML with --data.dataset FILE.yaml or a file with --data.dataset.path"
            )
        if self.path is None and not self.hub_file:
            raise UserError(
                f"data.dataset.hub_file must name the file to read from the hub data set {self.hub_id}, got none; see its file list"
            )
        if self.path is None and not self.revision:
            raise UserError(
                f"data.dataset.revision must pin the commit of the hub data set {self.hub_id}, got none; its history on the hub lists them"
            )


@dataclass
class MixPart:
    """One more instruction set in the same run."""

    dataset: DatasetSpec
    """The set: a YAML file as for ``data.dataset``. How it is written out and cut (template, system prompt, lengths, truncation,
    train_on_source, compat) is ``data.dataset``'s, so that the run has one style."""
    weight: float = 1.0
    """How often an epoch goes through the set: 0.5 is a fresh random half of its examples each epoch, 2 is each of them twice."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1000:
            raise UserError(f"data.mix.weight must be above 0 and below 1000, got {self.weight}; leave the set out of data.mix instead")
