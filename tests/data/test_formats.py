"""Every row shape becomes the same thing: a list of messages."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from qlora_lightning.data import formats
from qlora_lightning.data.formats import Conversation, Message, detect_format, read_conversations
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]


def short(conversation: Conversation) -> str:
    """A conversation in one line: ``u: question [context] | a: answer``."""
    return " | ".join(f"{m.role[0]}: {m.content}" + (f" [{m.context}]" if m.context else "") for m in conversation)


TREE = {
    "prompt": {
        "text": "q",
        "role": "prompter",
        "lang": "en",
        "replies": [
            {"text": "second", "role": "assistant", "lang": "en", "rank": 1, "replies": []},
            {
                "text": "best",
                "role": "assistant",
                "lang": "en",
                "rank": 0,
                "replies": [
                    {
                        "text": "q2",
                        "role": "prompter",
                        "lang": "de",
                        "rank": None,
                        "replies": [{"text": "a2", "role": "assistant", "lang": "en"}],
                    },
                    {"text": "q3", "role": "prompter", "lang": "en"},
                ],
            },
            {"text": "unranked", "role": "assistant", "lang": "en"},
            {"text": "gone", "role": "assistant", "lang": "en", "rank": -1, "deleted": True},
        ],
    }
}

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
    ("oasst1_tree", TREE, "u: q | a: best | u: q2 | a: a2"),
]


@pytest.mark.parametrize(("shape", "row", "expected"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_shape_is_detected_and_read(make_spec: SpecMaker, shape: str, row: dict[str, Any], expected: str) -> None:
    assert detect_format(row, "f:1") == shape
    for spec in (make_spec(), make_spec(format=shape)):
        assert [short(c) for c in read_conversations([("f:1", row)], spec, Counter())] == [expected]


def test_all_paths_of_a_tree_end_with_an_assistant_and_none_begins_another() -> None:
    paths = [short(path) for path in formats.oasst1_tree(TREE, "f:1", paths="all")]
    assert paths == ["u: q | a: second", "u: q | a: best | u: q2 | a: a2", "u: q | a: unranked"]


def test_other_languages_are_cut_off_a_tree_with_all_their_replies() -> None:
    assert [short(path) for path in formats.oasst1_tree(TREE, "f:1", languages=["en"])] == ["u: q | a: best"]
    assert formats.oasst1_tree(TREE, "f:1", languages=["fr"]) == []


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
        ("oasst1_tree", {"prompt": "p"}, "f:7: the row needs a message tree 'prompt', found prompt"),
        ("oasst1_tree", {"prompt": {"role": "prompter"}}, "f:7: field 'content' must be text, got null"),
        ("auto", {"question": "q", "reply": "r"}, "f:7: cannot tell the row's shape from its fields question, reply; understood are"),
        ("auto", {}, "from its fields none"),
    ],
)
def test_a_wrong_row_is_named_in_one_line(make_spec: SpecMaker, shape: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        list(read_conversations([("f:7", row)], make_spec(format=shape), Counter()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_languages_without_trees_are_refused(make_spec: SpecMaker) -> None:
    with pytest.raises(UserError, match="languages works for oasst1_tree rows only, but these are prompt_response"):
        list(read_conversations([("f:1", {"prompt": "p", "response": "r"})], make_spec(languages=["en"]), Counter()))


def test_rows_without_a_usable_answer_are_counted_not_refused(make_spec: SpecMaker) -> None:
    skipped: Counter[str] = Counter()
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    empty_last = [*answered, {"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}]
    rows = [("f", {"messages": turns}) for turns in (answered, empty_last, answered[:1], [])]
    assert len(list(read_conversations(rows, make_spec(), skipped))) == 1
    assert skipped == {"empty answer": 1, "no answer": 2}
    skipped.clear()
    assert not list(read_conversations([("f", TREE)], make_spec(languages=["fr"]), skipped))
    assert skipped == {"no usable path in the tree": 1}


def test_a_system_prompt_is_set_only_where_a_row_brings_none(make_spec: SpecMaker) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [("f", {"messages": turns}), ("f", {"messages": [{"role": "system", "content": "own"}, *turns]})]
    first, second = read_conversations(rows, make_spec(system_prompt="ours"), Counter())
    assert first[0] == Message("system", "ours")
    assert [m.content for m in second if m.role == "system"] == ["own"]
