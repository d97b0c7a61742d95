"""Labels are exactly what the assistant says, in every template, tokenizer and number of turns."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data import tokenize
from qlora_lightning.data.formats import Message, Row
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.templates import TEMPLATES, render
from qlora_lightning.data.tokenize import IGNORED, Encoder, TokenizedExample, answer_mask, prepare
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]
END = {"alpaca": "</s>", "guanaco": "</s>", "plain": "</s>", "chatml": "<|im_end|>"}
LEAD = {"alpaca": " ", "guanaco": " ", "plain": "", "chatml": ""}


def turns(*texts: str) -> Row:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def located(*rows: Row) -> list[tuple[str, Row]]:
    return [(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def supervised(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample) -> str:
    return decode(tokenizer, example.labels[example.labels != IGNORED])


control_words = st.sampled_from(
    ["<|im_end|>", "<s>", "</s>", "<|im_start|>assistant\n", "### Response:", "### Assistant:", "\n", " ", "<pad>"]
)
contents = st.lists(st.one_of(st.text(max_size=8), control_words), min_size=1, max_size=4).map("".join).filter(str.strip)
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=5)


@pytest.mark.parametrize("template", TEMPLATES)
@given(conversation=conversations, system=st.one_of(st.none(), contents))
def test_supervised_tokens_are_the_answers_and_their_end_tokens(
    tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker, template: str, conversation: list[tuple[str, str]], system: str | None
) -> None:
    spec = make_spec(template=template, system_prompt=system)
    dataset, report = prepare(located(turns(*(text for pair in conversation for text in pair))), spec, tiny_tokenizer)
    example = dataset[0]
    assert supervised(tiny_tokenizer, example) == "".join(LEAD[template] + answer + END[template] for _, answer in conversation)
    ends = int(np.sum(example.labels == tiny_tokenizer.convert_tokens_to_ids(END[template])))
    assert ends == len(conversation)  # none of those that messages spell
    assert np.flatnonzero(example.input_ids == tiny_tokenizer.bos_token_id).tolist() == [0]
    assert report.supervised_tokens == int(np.sum(example.labels != IGNORED)) == dataset.targets[0]
    assert report.straddling_tokens == 0


@pytest.mark.parametrize("template", TEMPLATES)
@given(conversation=conversations)
def test_with_merges_only_a_token_that_straddles_an_answers_beginning_is_left_out(
    merging_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker, template: str, conversation: list[tuple[str, str]]
) -> None:
    texts = [text for pair in conversation for text in pair]
    dataset, report = prepare(located(turns(*texts)), make_spec(template=template), merging_tokenizer)
    expected = "".join(LEAD[template] + answer + END[template] for _, answer in conversation)
    found = supervised(merging_tokenizer, dataset[0])
    assert np.sum(dataset[0].input_ids == merging_tokenizer.bos_token_id) == 1
    if report.straddling_tokens == 0:
        assert found == expected
    else:
        assert len(found) < len(expected)
        assert found.endswith(END[template])


def test_offsets_are_whole_although_the_tokenizer_trims_them(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    """Trimmed, a lone blank has no width and seems to stand where the next word begins."""
    trimmed = merging_tokenizer("a é", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert trimmed[1] == (2, 2)
    rendering = render([Message("user", "q"), Message("assistant", "xx")], TEMPLATES["guanaco"], "<s>", "</s>")
    (tokens,) = Encoder(merging_tokenizer, TEMPLATES["guanaco"]).encode([rendering])
    assert tokens is not None
    assert "".join(rendering.text[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)) == rendering.text
    assert merging_tokenizer.backend_tokenizer.post_processor is not None  # the tokenizer itself is left as it was


def test_a_blank_before_an_answer_is_part_of_its_first_token(merging_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    dataset, report = prepare(located(turns("What?", "The river")), make_spec(template="guanaco"), merging_tokenizer)
    first = dataset[0].labels[dataset[0].labels != IGNORED][0]
    assert decode(merging_tokenizer, [first]) == " The"
    assert report.straddling_tokens == 0


def test_sentencepiece_tokens_are_those_of_inference(sentencepiece_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    """The prompt's tokens do not change when an answer follows, and the answer's first word carries its blank."""
    dataset, _ = prepare(located(turns("What?", "The river")), make_spec(template="guanaco"), sentencepiece_tokenizer)
    prompt = sentencepiece_tokenizer("<s>### Human: What?### Assistant:", add_special_tokens=False)["input_ids"]
    ids, labels = dataset[0]
    assert ids[: len(prompt)].tolist() == prompt
    assert set(labels[: len(prompt)]) == {IGNORED}
    assert str(sentencepiece_tokenizer.convert_ids_to_tokens(int(labels[len(prompt)]))).startswith("▁T")


def test_a_token_that_begins_in_the_prompt_is_counted_and_not_trained_on(
    merging_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker
) -> None:
    dataset, report = prepare(located(turns("The ri", "ver is")), make_spec(template="plain"), merging_tokenizer)
    assert report.straddling_tokens == 1
    assert supervised(merging_tokenizer, dataset[0]) == " is</s>"


def test_a_control_token_in_a_message_stays_text(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    rows = located(turns("say <|im_end|> and </s>", "<s>ok<|im_start|>"), turns("q", "a"))
    dataset, report = prepare(rows, make_spec(), tiny_tokenizer)
    ids = [tiny_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "</s>", "<s>")]
    assert [int(np.sum(dataset[0].input_ids == number)) for number in ids] == [2, 2, 0, 1]
    assert decode(tiny_tokenizer, dataset[0].input_ids).count("<|im_end|>") == 3
    assert report.respelled == 1


def test_a_control_token_that_cannot_be_taken_apart_costs_the_row(make_spec: SpecMaker, merging_tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokens that a tokenizer knows without calling them special are never split."""
    state = json.loads(merging_tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = not token["content"].startswith("<|")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    _, report = prepare(located(turns("say <|im_end|>", "a"), turns("q", "a")), make_spec(), tokenizer)
    assert (report.kept, report.skipped) == (1, {"text spells a control token": 1})


def test_train_on_source_trains_on_everything_but_bos(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    example = prepare(located(turns("q", "a")), make_spec(template="guanaco", train_on_source=True), tiny_tokenizer)[0][0]
    assert example.labels[0] == IGNORED
    assert decode(tiny_tokenizer, example.labels[1:]) == "### Human: q### Assistant: a</s>"


def test_what_follows_the_last_answer_is_left_out(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    dataset, _ = prepare(located(turns("q", "a", "never answered")), make_spec(), tiny_tokenizer)
    assert decode(tiny_tokenizer, dataset[0].input_ids).endswith("assistant\na<|im_end|>")


def test_the_report_accounts_for_every_row(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    rows = located(turns("q", "a"), turns("q", "a" * 500), turns("q", ""), turns("q", "a" * 20), turns("q"))
    dataset, report = prepare(rows, make_spec(template="guanaco", max_length=100, target_max_length=400), tiny_tokenizer)
    assert (report.rows, report.kept, len(dataset)) == (5, 2, 2)
    assert report.skipped == {"longer than max_length": 1, "empty answer": 1, "no answer": 1}
    assert report.truncated == 0  # the one that was cut to 400 was dropped for 100
    assert dataset.lengths.tolist() == [30, 49]  # one token a letter: 28 of prompt, answer, end
    assert (report.length_min, report.length_median, report.length_max) == (30, 39.5, 49)
    assert (report.tokens, report.supervised_tokens) == (79, 3 + 22)


def test_a_cut_answer_ends_with_its_end_token_and_is_counted(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    spec = make_spec(template="alpaca", source_max_length=300, target_max_length=10)
    row = {"instruction": "i" * 400, "output": "o" * 40}
    dataset, report = prepare(located(row), spec, tiny_tokenizer)
    assert supervised(tiny_tokenizer, dataset[0]) == " " + "o" * 8 + "</s>"
    text = decode(tiny_tokenizer, dataset[0].input_ids)
    assert text.startswith("<s>Below is an instruction")
    assert "iiii### Response: oo" in text  # the mark stays when the prompt before it is cut
    assert (dataset.lengths[0], report.truncated) == (310, 1)


def test_when_no_row_is_left_the_error_says_why(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    rows = located(turns("q", ""), turns("q", "a" * 99))
    with pytest.raises(
        UserError, match="no row of the data set is left to use: 1 empty answer, 1 longer than max_length, of 2 rows; correct"
    ):
        prepare(rows, make_spec(max_length=50), tiny_tokenizer)
    with pytest.raises(UserError, match="1 no supervised token left after truncation, of 1 rows"):
        prepare(located(turns("q" * 99, "a")), make_spec(max_length=50, truncation="right"), tiny_tokenizer)


def test_a_slow_tokenizer_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="need a fast tokenizer with character offsets, got TokenizersBackend"):
        Encoder(tiny_tokenizer, TEMPLATES["guanaco"])


def test_batches_do_not_change_the_result(
    tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = located(*(turns("q" * n, "a" * n) for n in range(1, 8)))
    whole = prepare(rows, make_spec(), tiny_tokenizer)[0].fingerprint()
    monkeypatch.setattr(tokenize, "_BATCH", 3)
    assert prepare(rows, make_spec(), tiny_tokenizer)[0].fingerprint() == whole


def test_a_bar_is_shown_on_stderr_for_many_rows_only(
    tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = located(turns("q", "a"), turns("q", "a"))
    prepare(rows, make_spec(), tiny_tokenizer)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(tokenize, "_PROGRESS_FROM", 1)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    prepare(rows, make_spec(), tiny_tokenizer)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Tokenizing" in shown.err


@pytest.mark.parametrize("change", [turns("q", "b"), turns("r", "a"), turns("q", "aa")])
def test_the_fingerprint_sees_every_change(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker, change: Row) -> None:
    first, second = (prepare(located(row), make_spec(), tiny_tokenizer)[0].fingerprint() for row in (turns("q", "a"), change))
    assert first != second
    assert len(first) == 64


def test_the_fingerprint_sees_labels(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    row = located(turns("q", "a"))
    all_of_it = prepare(row, make_spec(template="guanaco", train_on_source=True), tiny_tokenizer)[0]
    answers = prepare(row, make_spec(template="guanaco"), tiny_tokenizer)[0]
    assert np.array_equal(all_of_it[0].input_ids, answers[0].input_ids)
    assert all_of_it.fingerprint() != answers.fingerprint()


def test_a_token_belongs_to_the_span_in_which_it_starts() -> None:
    """An end token that takes the line end behind it along (some do) is still the answer's."""
    ids, starts, ends = np.array([[1, 2, 3, 4], [0, 4, 6, 9], [4, 6, 9, 10]], dtype=np.int32)
    tokens = tokenize.Encoded(ids, starts, ends, respelled=False)
    mask, straddling = answer_mask(tokens, [(4, 8)])
    assert (mask.tolist(), straddling) == ([False, True, True, False], 0)
    assert answer_mask(tokens, [(5, 8)])[1] == 1
