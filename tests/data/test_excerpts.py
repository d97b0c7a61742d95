"""Examples as text: what is trained on is cut out exactly, blanks included, and cannot steer the terminal."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.dataset import TokenizedDataset
from qlora_lightning.data.excerpts import Excerpt, Piece, excerpts, harmless, visible
from qlora_lightning.data.prepared import tokenized
from qlora_lightning.data.spec import DatasetSpec

SpecMaker = Callable[..., DatasetSpec]
RIVER = [
    {"role": "user", "content": "What is the river?"},
    {"role": "assistant", "content": "Elbe."},
    {"role": "user", "content": "Yes?"},
    {"role": "assistant", "content": "Yes.\n"},
]


def shown(rows: list[Any], spec: DatasetSpec, tokenizer: PreTrainedTokenizerFast) -> list[Excerpt]:
    chunks = tokenized(((f"rows.jsonl:{n}", row) for n, row in enumerate(rows, 1)), spec, tokenizer)
    examples = TokenizedDataset.from_batches([chunk.batch for chunk in chunks], "")
    return list(excerpts(examples, ["river"], tokenizer, None))


@pytest.mark.parametrize("tokenizer", ["tiny_tokenizer", "merging_tokenizer", "sentencepiece_tokenizer"])
def test_every_answer_is_a_piece_with_its_blank_and_end(make_spec: SpecMaker, tokenizer: str, request: pytest.FixtureRequest) -> None:
    (one,) = shown([{"messages": RIVER}], make_spec(template="guanaco"), request.getfixturevalue(tokenizer))
    assert one.supervised == [" Elbe.</s>", " Yes.\n</s>"]
    assert [piece.supervised for piece in one.pieces] == [False, True, False, True]
    assert one.pieces[2] == Piece("### Human: Yes?### Assistant:", False)
    assert "".join(piece.text for piece in one.pieces) == one.text
    assert one.text.startswith("<s>")


def test_the_numbers_are_those_of_the_loss(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A token a byte: ``Elbe.`` behind its blank, ``Yes.`` with blank and line end, and an end token each."""
    rows = [{"messages": RIVER[:2]}, {"messages": RIVER}]
    _, both = shown(rows, make_spec(template="guanaco"), tiny_tokenizer)
    assert (both.row, both.supervised_tokens) == (2, 7 + 7)
    assert both.input_tokens == len(both.text) - 2 * len("</s>") - len("<s>") + 3
    assert both.heading == f"river, row 2: {both.input_tokens} tokens, 14 supervised"


def test_where_prompts_are_trained_on_too_only_bos_is_not(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (one,) = shown([{"messages": RIVER[:2]}], make_spec(template="guanaco", train_on_source=True), tiny_tokenizer)
    assert one.pieces == [Piece("<s>", False), Piece(one.text.removeprefix("<s>"), True)]


def test_what_is_out_of_the_ordinary_is_noted(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spec = make_spec(compat="paper", template="alpaca", target_max_length=3)
    (one,) = shown([{"instruction": "say <s>", "output": "Elbe"}], spec, tiny_tokenizer)
    assert one.supervised == ["Elb"]
    assert one.notes == ["cut to length", "spells a control token", "lost its end token"]
    assert one.heading.endswith("3 supervised (cut to length, spells a control token, lost its end token)")


def test_the_first_of_each_set_are_taken(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def part(*texts: str) -> TokenizedDataset:
        rows = (("x", {"prompt": text, "response": text}) for text in texts)
        return TokenizedDataset.from_batches([chunk.batch for chunk in tokenized(rows, make_spec(), tiny_tokenizer)], "")

    mixed = TokenizedDataset.mixed([(part("a", "b", "c"), 1.0), (part("d"), 2.0), (part("e", "f"), 1.0)])
    names = ["one", "two", "three"]
    two_each = [(one.set, one.row, one.supervised[0][0]) for one in excerpts(mixed, names, tiny_tokenizer, 2)]
    assert two_each == [("one", 1, "a"), ("one", 2, "b"), ("two", 1, "d"), ("three", 1, "e"), ("three", 2, "f")]
    assert [one.supervised[0][0] for one in excerpts(mixed, names, tiny_tokenizer, None)] == list("abcdef")
    assert list(excerpts(mixed, names, tiny_tokenizer, 0)) == []


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" Elbe.", "·Elbe."),
        ("Elbe. ", "Elbe.·"),
        ("The river Elbe", "The river Elbe"),
        ("two  blanks", "two··blanks"),
        ("one \n two\n", "one·⏎\n·two⏎\n"),
        ("a\tb", "a→\tb"),
        ("\x1b[2J", "␛[2J"),
    ],
)
def test_blanks_and_line_ends_that_a_reader_would_miss_are_marked(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_control_characters_are_shown_and_text_is_left_alone() -> None:
    assert harmless("\x1b]0;\x07\x7f\x9b\r\n\tÄ [bold]") == "␛]0;␇␡\\x9b␍\n\tÄ [bold]"
