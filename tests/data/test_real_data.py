"""The published rows themselves, through everything. Runs where QLORA_LIGHTNING_REAL_DATA names a folder of them: alpaca/, hh_rlhf/,
oasst1/, self_instruct/, flan_v2/, longform/ and vicuna_oa_eval/, each with the published files that the tests name."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.dataset import IGNORED
from qlora_lightning.data.files import read_rows
from qlora_lightning.data.formats import Conversation, gather, row_parser
from qlora_lightning.data.rendering import TemplateRenderer
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.data.templates import TEMPLATES
from qlora_lightning.recipes import shipped_root

SpecMaker = Callable[..., DatasetSpec]


@pytest.fixture(scope="module")
def folder() -> Path:
    name = os.environ.get("QLORA_LIGHTNING_REAL_DATA")
    if name is None:
        pytest.skip("needs published rows: set QLORA_LIGHTNING_REAL_DATA to a folder with alpaca/, oasst1/ and others")
    return Path(name)


def conversations(path: Path, spec: DatasetSpec) -> tuple[list[Conversation], Counter[str]]:
    rows = list(read_rows(path))
    parser = row_parser(spec, rows[0][1], rows[0][0])
    parsed = [parser(row, where) for where, row in gather(rows, parser)]
    return [c for found, _ in parsed for c in found], Counter(reason for _, reasons in parsed for reason in reasons)


def supervised_text(data: InstructionDataModule) -> list[str]:
    rows = (data.train_set[n].labels for n in range(len(data.train_set)))
    return [str(data.tokenizer.decode(labels[labels != IGNORED].tolist())) for labels in rows]


def test_alpaca_is_rendered_as_its_authors_rendered_it(folder: Path, make_spec: SpecMaker) -> None:
    """The set with ``text`` has the same prompt; there the answer follows a line end, in the QLoRA paper a blank."""
    path = folder / "alpaca" / "alpaca_tiny.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    read, _ = conversations(path, make_spec(format="instruction"))
    renderer = TemplateRenderer(TEMPLATES["alpaca"], None, "</s>")
    texts = [renderer.render(conversation).text for conversation in read]
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


def test_flat_messages_make_the_same_conversations_as_trees(
    folder: Path, make_spec: SpecMaker, write_rows: Callable[..., DataPath]
) -> None:
    """OASST1 is published both ways; here its trees are taken apart into messages, and those stand in another order."""
    path = folder / "oasst1" / "en_tree.jsonl.gz"

    def flat(node: dict[str, Any], tree: str, parent: str | None) -> list[dict[str, Any]]:
        own = {name: value for name, value in node.items() if name != "replies"}
        message = {**own, "message_tree_id": tree, "parent_id": parent}
        return [message, *(m for reply in node.get("replies") or [] for m in flat(reply, tree, node["message_id"]))]

    messages = [message for _, row in read_rows(path) for message in flat(row["prompt"], row["message_tree_id"], None)]
    assert len(messages) == 684
    for choice in ("best", "all"):
        spec = make_spec(oasst1_paths=choice)
        assert conversations(Path(write_rows(messages)), spec) == conversations(path, spec)


# What becomes of each set's rows under the limits of its own YAML, at one token a byte: rows, examples, why the others were left out.
FOUND = [
    ("alpaca", "alpaca/alpaca_3000.json.gz", {}, 3000, 2999, {"empty answer": 1}),
    ("alpaca", "alpaca/alpaca_en_demo.json", {}, 999, 999, {}),
    ("hh_rlhf", "hh_rlhf/harmless-base/test_part.jsonl.gz", {}, 1300, 1296, {"empty answer": 4}),
    ("longform", "longform/longform_train.json", {}, 17, 17, {}),
    ("oasst1", "oasst1/en_tree.jsonl.gz", {}, 60, 58, {"no supervised token left after truncation": 2}),
    ("oasst1", "oasst1/en_tree.jsonl.gz", {"oasst1_paths": "all"}, 60, 310, {"no supervised token left after truncation": 11}),
    ("self_instruct", "self_instruct/p3_prompt_completion", {}, 1200, 1200, {}),
    ("unnatural_instructions", "self_instruct/seed_tasks.jsonl", {}, 175, 175, {}),
]


@pytest.mark.parametrize(("name", "path", "fields", "rows", "examples", "skipped"), FOUND)
def test_published_rows_through_the_shipped_sets(
    folder: Path, tiny_base: Path, name: str, path: str, fields: dict[str, Any], rows: int, examples: int, skipped: dict[str, int]
) -> None:
    shipped = yaml.safe_load((shipped_root() / "datamodules" / f"{name}.yaml").read_text(encoding="utf-8"))
    here = {"path": DataPath(folder / path), "validation_size": 0, **fields}
    data = InstructionDataModule(DatasetSpec(**{**shipped, **here}), str(tiny_base))
    data.setup("fit")
    report = data.train_report
    assert report is not None
    assert (report.rows, report.kept, report.skipped) == (rows, examples, skipped)
    assert (report.lost_ends, report.doubled_bos) == (0, 0)
    ends = [labels[labels != IGNORED][-1] for labels in (data.train_set[n].labels for n in range(examples))]
    assert set(ends) == {data.tokenizer.eos_token_id}


def test_nothing_of_the_literal_end_of_self_instruct_is_left(folder: Path, make_spec: SpecMaker) -> None:
    for path in sorted((folder / "self_instruct" / "p3_prompt_completion").iterdir()):
        assert all(row["completion"].endswith("<|endoftext|>") for _, row in read_rows(path))
        read, _ = conversations(path, make_spec())
        assert not [message for conversation in read for message in conversation if "<|endoftext|>" in message.content]


def test_flan_chain_of_thought(folder: Path, make_spec: SpecMaker, write_rows: Callable[..., DataPath]) -> None:
    """The published tables hold question, answer and rationale, before templates; as inputs and targets they are FLAN's rows."""
    rows = []
    for table in sorted((folder / "flan_v2" / "cot_data").glob("*.tsv*")):
        content = gzip.decompress(table.read_bytes()) if table.suffix == ".gz" else table.read_bytes()
        cells = [line.split("\t") for line in content.decode("utf-8").split("\n") if line]
        rows += [{"inputs": question, "targets": f"{why} The answer is {answer}."} for question, answer, why in cells]
    assert len(rows) == 20_261
    read, skipped = conversations(Path(write_rows(rows)), make_spec(template="completion"))
    assert (len(read), skipped) == (20_261, Counter())


def test_the_openassistant_questions_are_guanaco_text(folder: Path, make_spec: SpecMaker, write_rows: Callable[..., DataPath]) -> None:
    """953 prompts with one to three human turns; input and output together are a whole conversation in the Guanaco form."""
    rows = [row for _, row in read_rows(folder / "vicuna_oa_eval" / "prompts" / "oa_questions.jsonl.gz")]
    texts = [{"text": f"{row['input']} {row['output']}"} for row in rows]
    read, skipped = conversations(Path(write_rows(texts)), make_spec(format="guanaco_text"))
    turns = Counter(sum(message.role == "user" for message in conversation) for conversation in read)
    assert (len(read) + sum(skipped.values()), turns) == (953, Counter({1: 517, 2: 414, 3: 22}))
