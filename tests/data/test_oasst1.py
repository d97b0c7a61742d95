"""Message trees become conversations, whether a row holds a tree or a message."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest

from qlora_lightning.data.formats import gather, row_parser
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]
Read = tuple[list[str], list[str]]


def message(identity: Any, parent: Any, text: str, **fields: Any) -> dict[str, Any]:
    """A flat row. The text's first letter tells whose it is: q the prompter's, a the assistant's."""
    role = "prompter" if text.startswith("q") else "assistant"
    return {"message_id": identity, "parent_id": parent, "text": text, "role": role, "lang": "en", "deleted": False, "rank": None, **fields}


MESSAGES = [
    message("1", None, "q"),
    message("2", "1", "a second", rank=1),
    message("3", "1", "a best", rank=0),
    message("4", "3", "q2", lang="de"),
    message("5", "4", "a2"),
    message("6", "3", "q3"),
    message("7", "1", "a unranked"),
    message("8", "1", "a gone", rank=-1, deleted=True),
    message("9", None, "q other tree"),
    message("10", "9", "a other"),
]


def tree(root: str) -> dict[str, Any]:
    """The same messages as one nested row."""

    def node(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "replies": [node(reply) for reply in MESSAGES if reply["parent_id"] == row["message_id"]]}

    return {"message_tree_id": root, "prompt": node(next(row for row in MESSAGES if row["message_id"] == root))}


def read(rows: list[dict[str, Any]], spec: DatasetSpec) -> Read:
    """The conversations, a line each, and the reasons of what is left out; row n stands at f:n."""
    located = [(f"f:{number}", row) for number, row in enumerate(rows, 1)]
    parser = row_parser(spec, rows[0], "f:1")
    results = [parser(row, where) for where, row in gather(located, parser)]
    return [" | ".join(m.content for m in c) for found, _ in results for c in found], [reason for _, left in results for reason in left]


SHAPES = pytest.mark.parametrize("rows", [MESSAGES, [tree("1"), tree("9")]], ids=["messages", "trees"])


@SHAPES
def test_the_best_path_takes_the_best_ranked_reply_and_ends_with_an_answer(make_spec: SpecMaker, rows: list[dict[str, Any]]) -> None:
    assert read(rows, make_spec()) == (["q | a best | q2 | a2", "q other tree | a other"], [])


@SHAPES
def test_all_paths_end_with_an_answer_and_none_begins_another(make_spec: SpecMaker, rows: list[dict[str, Any]]) -> None:
    paths, _ = read(rows, make_spec(oasst1_paths="all"))
    assert paths == ["q | a second", "q | a best | q2 | a2", "q | a unranked", "q other tree | a other"]


@SHAPES
def test_other_languages_are_cut_off_a_tree_with_all_their_replies(make_spec: SpecMaker, rows: list[dict[str, Any]]) -> None:
    assert read(rows, make_spec(languages=["en"]))[0] == ["q | a best", "q other tree | a other"]
    assert read(rows, make_spec(languages=["fr"])) == ([], ["no usable path in the tree"] * 2)


@SHAPES
def test_in_the_authors_form_a_path_ends_where_the_tree_ends(make_spec: SpecMaker, rows: list[dict[str, Any]]) -> None:
    """A question that nobody answered stays at its end; every turn has its mark, and nothing separates them."""
    every, _ = read(rows, make_spec(oasst1_paths="all", compat="paper"))
    assert " | ### Human: q### Assistant: a best### Human: q3" in every
    best, _ = read(rows, make_spec(compat="paper"))
    assert best[0] == " | ### Human: q### Assistant: a best### Human: q2### Assistant: a2"


def test_messages_make_the_same_tree_in_any_order(make_spec: SpecMaker) -> None:
    rows = [message("1", None, "q"), message("2", "1", "a"), message("3", "2", "q2"), message("4", "3", "a2")]
    for order in permutations(rows):
        spec = make_spec(format="oasst1_messages")
        assert read(list(order), spec) == (["q | a | q2 | a2"], [])


def test_unranked_replies_keep_the_order_of_the_file(make_spec: SpecMaker) -> None:
    rows = [message("1", None, "q"), message("3", "1", "a first"), message("2", "1", "a second")]
    assert read(rows, make_spec())[0] == ["q | a first"]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([message("2", "1", "a")], "f:3: a reply's parent must have a row, but none has message_id '1'; add it or remove the reply"),
        ([message("r", None, "q")], "f:3: a message_id must stand in one row only, but 'r' is in f:1 too; remove one of the rows"),
        (
            [message("2", "3", "a"), message("3", "2", "q")],
            "f:3: a reply's parents must lead to a root, but those over parent_id '3' do not",
        ),
        ([message("2", "2", "a")], "f:3: a reply's parents must lead to a root"),
        ([message(None, None, "q")], "f:3: field 'message_id' must be text, got null; correct or remove the row"),
        ([message("2", 7, "a")], "f:3: field 'parent_id' must be text, got int"),
        ([{**message("2", None, "q"), "role": "human"}], "f:3: a message's role must be prompter or assistant, got 'human'"),
        ([message("2", None, "a")], "f:3: user and assistant must speak in turn, but message 1 is by assistant"),
        ([{**message("2", None, "q"), "text": None}], "f:3: field 'text' must be text, got null"),
        ([message("2", None, "q"), {**message("3", "2", "a"), "text": 3}], "f:4: field 'text' must be text, got int"),
        (
            [message("2", None, "q"), message("3", "2", "q"), message("4", "3", "a")],
            "f:3: user and assistant must speak in turn, but message 2 is by user",
        ),
        ([message("2", None, "q", deleted="False")], "f:3: field 'deleted' must be true, false or null, got str"),
        ([message("2", None, "q", rank="0")], "f:3: field 'rank' must be a number or null, got str"),
    ],
)
def test_a_wrong_message_is_named_by_its_row_and_costs_no_other_tree(make_spec: SpecMaker, rows: list[Any], error: str) -> None:
    """Rows 1 and 2 are a good tree, and stay one: the error belongs to the unit of the row that is wrong."""
    spec = make_spec(format="oasst1_messages", oasst1_paths="all")
    located = [(f"f:{n}", row) for n, row in enumerate([message("r", None, "q"), message("s", "r", "a"), *rows], 1)]
    parser = row_parser(spec, located[0][1], "f:1")
    (where, good), *units = gather(located, parser)
    assert (where, len(parser(good, where)[0])) == ("f:1", 1)
    with pytest.raises(UserError) as raised:
        for where, unit in units:
            parser(unit, where)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("without", ["message_tree_id", None])
def test_a_tree_that_is_there_twice_names_both_places(make_spec: SpecMaker, without: str | None) -> None:
    rows = [{name: value for name, value in tree(root).items() if name != without} for root in ("1", "9", "1")]
    with pytest.raises(UserError, match=r"f:3: a message_tree_id must stand in one row only, but '1' is in f:1 too"):
        read(rows, make_spec())


@pytest.mark.parametrize(
    ("root", "error"),
    [
        ({"role": "prompter"}, "f:1: the row needs a field 'text', found role"),
        ({"role": "prompter", "text": " "}, "f:1: field 'text' must not be empty"),
        ({**message("1", None, "q"), "replies": "x"}, "f:1: a message's replies must be a list of messages, got str"),
        (
            {**message("1", None, "q"), "replies": [message("2", "7", "a")]},
            "f:1: a reply must stand below its parent, but the one with parent_id '7' stands below message '1'; correct or remove the row",
        ),
    ],
)
def test_a_wrong_tree_is_named_in_one_line(make_spec: SpecMaker, root: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError) as raised:
        read([{"prompt": root}], make_spec())
    assert error in str(raised.value)
