"""Every row shape becomes the same thing: a list of messages."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest

from qlora_lightning.data.formats import FORMATS, Conversation, Message, detect_format, row_parser
from qlora_lightning.data.spec import DatasetSpec, Format
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]


def short(conversation: Conversation) -> str:
    """A conversation in one line: ``u: question [context] | a: answer``."""
    return " | ".join(f"{m.role[0]}: {m.content}" + (f" [{m.context}]" if m.context else "") for m in conversation)


def parse(row: dict[str, Any], spec: DatasetSpec, where: str = "f:7") -> tuple[list[Conversation], list[str]]:
    return row_parser(spec, row, where)(row, where)


SEED = {"id": "seed_1", "name": "n", "instruction": "do", "is_classification": False}
CORE = {"instruction_with_input": "do with x", "input": "x", "constraints": "None.", "output": "done"}
TREE = {"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant"}]}}

ROWS = [
    ("instruction", {"instruction": "do", "output": "done"}, "u: do | a: done"),
    ("instruction", {"instruction": "do", "input": "with", "output": "done"}, "u: do [with] | a: done"),
    ("instruction", {"instruction": "do", "input": "", "output": "done"}, "u: do | a: done"),
    ("instruction", {"instruction": "do", "input": None, "output": "done"}, "u: do | a: done"),
    ("instruction", {"instruction": "do", "input": "<noinput>", "output": "done"}, "u: do | a: done"),
    ("instruction", {"instruction": "do", "input": "No input", "output": "done"}, "u: do | a: done"),
    ("instruction", {"instruction": "do", "input": '"< noinput >"', "output": "done"}, "u: do | a: done"),
    ("instruction", {"instruction": "do", "input": "?!", "output": "done"}, "u: do [?!] | a: done"),
    ("prompt_response", {"prompt": "p", "response": "r"}, "u: p | a: r"),
    ("prompt_response", {"prompt": "p", "completion": "r"}, "u: p | a: r"),
    ("prompt_response", {"input": "p", "output": "r"}, "u: p | a: r"),
    (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "s: s | u: q | a: a",
    ),
    ("messages", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "u: q | a: a"),
    ("guanaco_text", {"text": "### Human: q### Assistant: a### Human: q2### Assistant: a2"}, "u: q | a: a | u: q2 | a: a2"),
    ("guanaco_text", {"text": "### Human: q ### Assistant: a\nb"}, "u: q | a: a\nb"),
    ("guanaco_text", {"text": "Be kind.\n### Human:\nq\n### Assistant:\n  a"}, "s: Be kind. | u: q | a:   a"),
    ("oasst1_tree", TREE, "u: q | a: a"),
    ("prompt_response", {"inputs": "p", "targets": "r", "task_name": "t", "template_type": "zs_opt"}, "u: p | a: r"),
    ("prompt_response", {"input": "p", "output": "r", "source": "wiki", "subset": "s"}, "u: p | a: r"),
    ("prompt_response", {"prompt": "p", "completion": "<|endoftext|> is a token"}, "u: p | a: <|endoftext|> is a token"),
    ("self_instruct", {"prompt": "p\n\n", "completion": " r<|endoftext|>\n"}, "u: p\n\n | a: r"),
    ("unnatural", {**SEED, "instances": [{"input": "", "output": "done"}]}, "u: do | a: done"),
    ("unnatural", {**SEED, "instances": [{"input": "with", "output": "done"}]}, "u: do [with] | a: done"),
    ("unnatural", {"instruction": "do", "instances": [CORE]}, "u: do with x | a: done"),
    ("hh_rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: a ", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "u: q | a: a"),
    (
        "hh_rlhf",
        {"chosen": "\n\nHuman: q \nHuman: x\n\nAssistant: a\n\nb\n\nHuman: q2\n\nAssistant:  a2"},
        "u: q \nHuman: x | a: a\n\nb | u: q2 | a: a2",
    ),
    ("hh_rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b"}, "u: q | a: a\n\nb"),
    ("hh_rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: \n\nAssistant: b"}, "u: q | a: b"),
    ("chip2", {"text": "<human>: q\n<bot>: a\nb", "metadata": {"source": "x"}}, "u: q | a: a\nb"),
    ("chip2", {"text": "<human>: a <bot>: in text\n<bot>: a\n<human>: q2\n<bot>: a2\n"}, "u: a <bot>: in text | a: a | u: q2 | a: a2"),
]


@pytest.mark.parametrize(("shape", "row", "expected"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_shape_is_detected_and_read(make_spec: SpecMaker, shape: str, row: dict[str, Any], expected: str) -> None:
    assert detect_format(row, "f:1") == shape
    for spec in (make_spec(), make_spec(format=shape)):
        conversations, reasons = parse(row, spec)
        assert ([short(c) for c in conversations], reasons) == ([expected], [])


def test_a_message_of_a_tree_is_told_from_a_row_that_only_quotes_its_ids() -> None:
    assert detect_format({"message_id": "m", "parent_id": None, "role": "prompter", "text": "q"}, "f:1") == "oasst1_messages"
    assert detect_format({"message_id": "m", "parent_id": "p", "text": "t", "input": "q", "output": "a"}, "f:1") == "prompt_response"


def test_every_format_that_can_be_named_has_a_function() -> None:
    assert {*get_args(Format)} == {"auto", *FORMATS}


def test_every_instance_and_reformulation_is_a_conversation(make_spec: SpecMaker) -> None:
    reworded = {"instruction": "act", "instruction_with_input": "act with x", "input": "x", "output": "done"}
    row = {"instruction": "do", "instances": [CORE, {**CORE, "output": ""}, CORE], "reformulations": [reworded]}
    conversations, reasons = parse(row, make_spec())
    assert [short(c) for c in conversations] == ["u: do with x | a: done"] * 2 + ["u: act with x | a: done"]
    assert reasons == ["empty answer"]
    assert len(parse(row, make_spec(reformulations=False))[0]) == 2
    assert len(parse({**row, "reformulations": None}, make_spec())[0]) == 2
    assert parse({**row, "instances": [], "reformulations": None}, make_spec()) == ([], ["no answer"])


@pytest.mark.parametrize(
    ("shape", "row", "message"),
    [
        ("instruction", {"instruction": "do"}, "f:7: the row needs a field 'output', found instruction; add it"),
        ("instruction", {"instruction": "do", "output": None}, "f:7: field 'output' must be text, got null"),
        ("instruction", {"instruction": 3, "output": "x"}, "f:7: field 'instruction' must be text, got int"),
        ("instruction", {"instruction": " ", "output": "x"}, "f:7: field 'instruction' must not be empty, got ' '"),
        ("instruction", {"instruction": "a", "input": 5, "output": "x"}, "f:7: field 'input' must be text, got int"),
        ("instruction", {"instruction": "\ud800", "output": "x"}, "f:7: field 'instruction' holds half a surrogate pair"),
        ("prompt_response", {"prompt": "p"}, "f:7: the row needs a field 'response', found prompt"),
        ("messages", {"text": "t"}, "f:7: the row needs a list 'messages' of role and content, found text"),
        ("messages", {"messages": "t"}, "f:7: the row needs a list 'messages'"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "f:7: message 1: a role must be one of system, user"),
        ("messages", {"messages": [{"role": "user"}]}, "f:7: message 1: the row needs a field 'content', found role"),
        ("messages", {"messages": [{"role": "user", "content": ""}]}, "f:7: message 1: field 'content' must not be empty"),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}]}, "message 1 is by assistant where user is due"),
        (
            "messages",
            {"messages": [{"role": "system", "content": "s"}, *[{"role": "user", "content": "q"}] * 2]},
            "f:7: user and assistant must speak in turn, but message 3 is by user where assistant is due",
        ),
        ("guanaco_text", {"text": "hello"}, "f:7: field 'text' needs the marks '### Human:' and '### Assistant:'"),
        ("guanaco_text", {"text": "### Human: ### Assistant: a"}, "f:7: a '### Human:' turn must not be empty"),
        ("prompt_response", {"inputs": "p", "targets": 3}, "f:7: field 'targets' must be text, got int"),
        (
            "hh_rlhf",
            {"chosen": "Hello"},
            r"f:7: field 'chosen' must be turns with the marks '\n\nHuman: ' and '\n\nAssistant: ', found none",
        ),
        ("hh_rlhf", {"chosen": "Hi.\n\nHuman: q\n\nAssistant: a"}, "f:7: field 'chosen' must be turns with the marks"),
        ("hh_rlhf", {"chosen": "Hi.\n\nHuman: q\n\nAssistant: a"}, "found 'Hi.' before the first; correct or remove the row"),
        ("hh_rlhf", {"chosen": "\n\nHuman: \n\nAssistant: a"}, "f:7: a turn of Human in field 'chosen' must not be empty"),
        ("hh_rlhf", {"chosen": "\n\nAssistant: a"}, "f:7: user and assistant must speak in turn, but message 1 is by assistant"),
        ("hh_rlhf", {"chosen": None}, "f:7: field 'chosen' must be text, got null"),
        ("chip2", {"text": "### Human: q"}, r"must be turns with the marks '<human>: ' and '\n<bot>: ', found none"),
        ("chip2", {"text": "<human>: q\n<human>: q2\n<bot>: a"}, "but message 2 is by user where assistant is due"),
        ("self_instruct", {"prompt": "p"}, "f:7: the row needs a field 'completion', found prompt"),
        ("self_instruct", {"prompt": "", "completion": "c"}, "f:7: field 'prompt' must not be empty"),
        ("unnatural", {"instruction": "do"}, "f:7: field 'instances' must be a list of objects, found instruction"),
        ("unnatural", {"instruction": "do", "instances": ["x"]}, "f:7: field 'instances' must be a list of objects"),
        ("unnatural", {"instruction": "do", "instances": [CORE, {"input": "x"}]}, "f:7: instances 2: the row needs a field 'output'"),
        ("unnatural", {"instances": [{"input": "x", "output": "y"}]}, "f:7: instances 1: the row needs a field 'instruction'"),
        ("unnatural", {"instances": [], "reformulations": [{"output": 1}]}, "f:7: reformulations 1: the row needs a field 'instruction'"),
        ("oasst1_tree", {"prompt": "p"}, "f:7: the row needs a message tree 'prompt', found prompt"),
        ("auto", {"question": "q", "reply": "r"}, "f:7: cannot tell the row's shape from its fields question, reply; understood are"),
        ("auto", {}, "from its fields none"),
    ],
)
def test_a_wrong_row_is_named_in_one_line(make_spec: SpecMaker, shape: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(row, make_spec(format=shape))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_languages_without_trees_are_refused(make_spec: SpecMaker) -> None:
    with pytest.raises(UserError, match="languages works for oasst1_tree and oasst1_messages rows only, but these are prompt_response"):
        row_parser(make_spec(languages=["en"]), {"prompt": "p", "response": "r"}, "f:1")


def test_a_conversation_without_a_usable_answer_is_given_a_reason(make_spec: SpecMaker) -> None:
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    empty_last = [*answered, {"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}]
    assert len(parse({"messages": answered}, make_spec())[0]) == 1
    assert parse({"messages": empty_last}, make_spec()) == ([], ["empty answer"])
    assert parse({"messages": answered[:1]}, make_spec()) == ([], ["no answer"])
    assert parse({"messages": []}, make_spec()) == ([], ["no answer"])
    assert parse({"chosen": "\n\nHuman: q\n\nAssistant: "}, make_spec()) == ([], ["empty answer"])
    assert parse({"prompt": "p", "completion": "<|endoftext|>"}, make_spec()) == ([], ["empty answer"])


def test_a_system_prompt_is_set_only_where_a_row_brings_none(make_spec: SpecMaker) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "own"}, *turns]
    (first,), _ = parse({"messages": turns}, make_spec(system_prompt="ours"))
    (second,), _ = parse({"messages": own}, make_spec(system_prompt="ours"))
    assert first[0] == Message("system", "ours")
    assert [m.content for m in second if m.role == "system"] == ["own"]


@pytest.mark.parametrize("compat", ["fixed", "paper"])
def test_a_parser_travels_to_other_processes(make_spec: SpecMaker, compat: str) -> None:
    row = {"instruction": "do", "output": "done"}
    parser = row_parser(make_spec(compat=compat), row, "f:1")
    assert pickle.loads(pickle.dumps(parser))(row, "f:1") == parser(row, "f:1")


def test_parsing_needs_neither_torch_nor_transformers() -> None:
    """Worker processes would wait for them, and each would hold them in memory."""
    code = "import sys, qlora_lightning.data.formats; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
