"""The published rows themselves, through everything. Runs where QLORA_LIGHTNING_REAL_DATA names a folder that holds
alpaca/alpaca_3000.json.gz, alpaca/alpaca_tiny.json, oasst1/en_tree.jsonl.gz and longform/longform_train.json."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.files import place, read_rows
from qlora_lightning.data.formats import Conversation, read_conversations
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.data.templates import TEMPLATES, render
from qlora_lightning.data.tokenize import IGNORED

SpecMaker = Callable[..., DatasetSpec]


@pytest.fixture(scope="module")
def folder() -> Path:
    name = os.environ.get("QLORA_LIGHTNING_REAL_DATA")
    if name is None:
        pytest.skip("needs published rows: set QLORA_LIGHTNING_REAL_DATA to a folder with alpaca/ and oasst1/")
    return Path(name)


def conversations(path: Path, spec: DatasetSpec) -> tuple[list[Conversation], Counter[str]]:
    skipped: Counter[str] = Counter()
    rows = [(place(path, number), row) for number, row in read_rows(path)]
    return list(read_conversations(rows, spec, skipped)), skipped


def supervised_text(data: InstructionDataModule) -> list[str]:
    rows = (data.train_set[n].labels for n in range(len(data.train_set)))
    return [str(data.tokenizer.decode(labels[labels != IGNORED].tolist())) for labels in rows]


def test_alpaca_is_rendered_as_its_authors_rendered_it(folder: Path, make_spec: SpecMaker) -> None:
    """The set with ``text`` has the same prompt; there the answer follows a line end, in the QLoRA paper a blank."""
    path = folder / "alpaca" / "alpaca_tiny.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    read, _ = conversations(path, make_spec(format="instruction"))
    texts = [render(conversation, TEMPLATES["alpaca"], None, "</s>").text for conversation in read]
    assert len(rows) == len(texts) == 100
    for row, text in zip(rows, texts, strict=True):
        assert text == row["text"].replace("### Response:\n", "### Response: ") + "</s>\n\n"


def test_alpaca(folder: Path, make_spec: SpecMaker, tiny_base: Path) -> None:
    """3,000 rows: one without an answer, five with <noinput>."""
    path = folder / "alpaca" / "alpaca_3000.json.gz"
    rows = [row for _, row in read_rows(path)]
    spec = make_spec(path=DataPath(path), template="alpaca", validation_size=100)
    data = InstructionDataModule(spec, str(tiny_base))
    data.setup("fit")
    assert data.val_report is not None
    reports = (data.train_report, data.val_report)
    assert sum(report.rows for report in reports) == len(rows) == 3000
    assert sum(report.skipped.get("empty answer", 0) for report in reports) == 1
    assert sum(report.kept for report in reports) == 2999
    contexts = [message.context.lower() for conversation in conversations(path, spec)[0] for message in conversation]
    assert not [text for text in contexts if len(text) < 25 and "noinput" in text.replace(" ", "")]
    answers = Counter(f" {row['output']}</s>" for row in rows)
    assert not Counter(supervised_text(data)) - answers


def test_alpaca_within_the_papers_lengths_keeps_every_end_token(folder: Path, make_spec: SpecMaker, tiny_base: Path) -> None:
    spec = make_spec(
        path=DataPath(folder / "alpaca" / "alpaca_3000.json.gz"), template="alpaca", source_max_length=384, target_max_length=128
    )
    data = InstructionDataModule(spec, str(tiny_base))
    data.setup("fit")
    assert data.train_report.truncated > 0
    assert data.train_report.length_max <= 384 + 128
    assert all(text.endswith("</s>") for text in supervised_text(data))


@pytest.mark.parametrize("template", ["guanaco", "chatml"])
def test_oasst1(folder: Path, make_spec: SpecMaker, tiny_base: Path, template: str) -> None:
    """60 English trees with 402 + 282 messages."""
    path = folder / "oasst1" / "en_tree.jsonl.gz"
    data = InstructionDataModule(make_spec(path=DataPath(path), template=template), str(tiny_base))
    data.setup("fit")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        roots = [json.loads(line)["prompt"]["text"] for line in file]
    read, skipped = conversations(path, data.spec)
    assert [conversation[0].content for conversation in read] == roots
    assert (len(read), skipped) == (60, Counter())
    end = data.tokenizer.convert_tokens_to_ids("</s>" if template == "guanaco" else "<|im_end|>")
    for n, conversation in enumerate(read):
        answers = sum(message.role == "assistant" for message in conversation)
        assert np.sum(data.train_set[n].labels == end) == answers


def test_every_assistant_message_of_a_tree_is_on_some_path(folder: Path, make_spec: SpecMaker) -> None:
    path = folder / "oasst1" / "en_tree.jsonl.gz"
    best, _ = conversations(path, make_spec())
    every, _ = conversations(path, make_spec(oasst1_paths="all"))
    assert all(conversation[-1].role == "assistant" for conversation in every)
    assert all(conversation in every for conversation in best)

    def assistants(node: dict[str, Any]) -> set[str]:
        own = {node["text"]} if node["role"] == "assistant" else set()
        return own.union(*(assistants(reply) for reply in node.get("replies") or []))

    expected = set().union(*(assistants(row["prompt"]) for _, row in read_rows(path)))
    assert {message.content for c in every for message in c if message.role == "assistant"} == expected


def test_oasst1_has_no_other_language_here(folder: Path, make_spec: SpecMaker) -> None:
    path = folder / "oasst1" / "en_tree.jsonl.gz"
    assert conversations(path, make_spec(languages=["en"])) == conversations(path, make_spec())
    assert conversations(path, make_spec(languages=["de"])) == ([], Counter({"no usable path in the tree": 60}))


def test_longform(folder: Path, make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    read, skipped = conversations(folder / "longform" / "longform_train.json", make_spec())
    assert (len(read), skipped) == (17, Counter())
