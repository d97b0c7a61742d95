"""Each shape as the QLoRA authors' code made it: what is tokenized as source and what as target, to the character."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_lightning.data.formats import Message, row_parser
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]

ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{do}\n\n### Response: "
)
ASKED_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{{do}}\n\n### Input:\n{}\n\n### Response: "
)
INSTANCE = {"instruction_with_input": "do with x", "input": "x", "constraints": "short", "output": "done"}
REWORDED = {"instruction": "act", "instruction_with_input": "act with x", "input": "x", "output": " done"}


@pytest.mark.parametrize(
    ("shape", "row", "pairs"),
    [
        ("instruction", {"instruction": "{do}", "input": "", "output": "done"}, [(ASKED, "done")]),
        ("instruction", {"instruction": "{do}", "output": " done "}, [(ASKED, " done ")]),
        ("instruction", {"instruction": "{do}", "input": "{x}", "output": ""}, [(ASKED_WITH_INPUT.format("{x}"), "")]),
        ("instruction", {"instruction": "{do}", "input": "<noinput>", "output": "a"}, [(ASKED_WITH_INPUT.format("<noinput>"), "a")]),
        ("instruction", {"instruction": "{do}", "input": " ", "output": "a"}, [(ASKED_WITH_INPUT.format(" "), "a")]),
        ("guanaco_text", {"text": "### Human: q ### Assistant: a\n"}, [("", "### Human: q ### Assistant: a\n")]),
        ("hh_rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "x"}, [("", "\n\nHuman: q\n\nAssistant: ")]),
        ("chip2", {"text": "<human>: q\n<bot>: a "}, [("q", "a ")]),
        ("chip2", {"text": "<human>: q\n<bot>: a\n<human>: q2\n<bot>: a2"}, [("q", "a\n<human>: q2")]),
        ("self_instruct", {"prompt": "p ", "completion": " c<|endoftext|>"}, [("p ", " c<|endoftext|>")]),
        ("prompt_response", {"input": "p ", "output": "r\n", "source": "s"}, [("p ", "r\n")]),
        ("prompt_response", {"inputs": "p", "targets": "r"}, [("p", "r")]),
        (
            "unnatural",
            {"instruction": "do", "instances": [INSTANCE, INSTANCE], "reformulations": [REWORDED]},
            [("do with x", "done"), ("do with x", "done"), ("act with x", " done")],
        ),
    ],
)
def test_a_row_becomes_the_authors_pairs(make_spec: SpecMaker, shape: str, row: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    """A system prompt is not theirs, and is not set; empty answers are kept."""
    parser = row_parser(make_spec(compat="paper"), row, "f:1")
    assert parser.format == shape
    assert parser(row, "f:1") == ([[Message("user", source), Message("assistant", target)] for source, target in pairs], [])


def test_reformulations_can_be_left_out(make_spec: SpecMaker) -> None:
    row = {"instruction": "do", "instances": [INSTANCE], "reformulations": [REWORDED]}
    parser = row_parser(make_spec(compat="paper", reformulations=False), row, "f:1")
    assert [conversation[0].content for conversation in parser(row, "f:1")[0]] == ["do with x"]


@pytest.mark.parametrize(
    ("shape", "row", "message"),
    [
        ("messages", {"messages": []}, "data.dataset.compat paper needs a shape that the authors' code knew, got messages; set"),
        ("chip2", {"text": "<human>: q"}, "f:1: field 'text' needs a line that begins with '<bot>: ', found none"),
        ("instruction", {"instruction": "do", "output": None}, "f:1: field 'output' must be text, got null"),
        ("unnatural", {"instances": [{"output": "a"}]}, "f:1: instances 1: the row needs a field 'instruction_with_input', found output"),
        ("hh_rlhf", {"text": "x"}, "f:1: the row needs a field 'chosen', found text"),
    ],
)
def test_what_the_authors_could_not_read_is_refused(make_spec: SpecMaker, shape: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        row_parser(make_spec(compat="paper", format=shape), row, "f:1")(row, "f:1")
    assert message in str(error.value)
