"""Rows to examples: tokens with true places, labels from spans, limits, and an account of every row. (test_masks.py: whatever is said.)"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from making import BACKENDS, SPECIAL, conversation, fast_tokenizer, located, prepare_rows, supervised_runs, turns, unigram_backend
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.dataset import IGNORED, TokenizedExample
from qlora_lightning.data.encoder import Encoded, Encoder, encode_prompts
from qlora_lightning.data.rendering import TemplateRenderer, load_renderer
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.templates import TEMPLATES
from qlora_lightning.data.tokenize import answer_mask
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def supervised(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample) -> str:
    return decode(tokenizer, example.labels[example.labels != IGNORED])


def test_offsets_are_whole_although_the_tokenizer_trims_them(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    """Trimmed, a lone blank has no width and seems to stand where the next word begins."""
    trimmed = merging_tokenizer("a é", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert trimmed[1] == (2, 2)
    renderer = load_renderer("guanaco", merging_tokenizer)
    rendering = renderer.render(conversation("q", "xx"))
    assert rendering is not None
    (tokens,) = Encoder.of(merging_tokenizer, renderer).encode([rendering])
    assert tokens is not None
    assert "".join(rendering.text[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)) == rendering.text
    assert merging_tokenizer.backend_tokenizer.post_processor is not None  # the tokenizer itself is left as it was


def test_a_blank_before_an_answer_is_part_of_its_first_token(merging_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    dataset, report = prepare_rows(located(turns("What?", "The river")), make_spec(template="guanaco"), merging_tokenizer)
    first = dataset[0].labels[dataset[0].labels != IGNORED][0]
    assert decode(merging_tokenizer, [first]) == " The"
    assert report.straddling_tokens == 0


def test_sentencepiece_tokens_are_those_of_inference(sentencepiece_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    """The prompt's tokens do not change when an answer follows, and the answer's first word carries its blank."""
    dataset, _ = prepare_rows(located(turns("What?", "The river")), make_spec(template="guanaco"), sentencepiece_tokenizer)
    prompt = sentencepiece_tokenizer("<s>### Human: What?### Assistant:", add_special_tokens=False)["input_ids"]
    ids, labels = dataset[0]
    assert ids[: len(prompt)].tolist() == prompt
    assert set(labels[: len(prompt)]) == {IGNORED}
    assert str(sentencepiece_tokenizer.convert_ids_to_tokens(int(labels[len(prompt)]))).startswith("▁T")


def test_no_token_joins_a_prompt_to_its_answer(merging_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    """``" river"`` is one token; at inference the prompt ends before the model can write it."""
    assert len(merging_tokenizer(" river", add_special_tokens=False)["input_ids"]) == 1
    dataset, report = prepare_rows(located(turns("The ri", "ver is")), make_spec(template="plain"), merging_tokenizer)
    ids, _labels = dataset[0]
    prompt = merging_tokenizer("The ri", add_special_tokens=False)["input_ids"]
    assert ids[1 : 1 + len(prompt)].tolist() == prompt
    assert supervised(merging_tokenizer, dataset[0]) == "ver is</s>"
    assert (report.straddling_tokens, report.respelled) == (0, 0)


def test_the_name_of_the_unknown_token_is_text(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    dataset, report = prepare_rows(located(turns("what is <unk>?", "<unk> is a token")), make_spec(), tiny_tokenizer)
    assert np.sum(dataset[0].input_ids == tiny_tokenizer.unk_token_id) == 0
    assert supervised(tiny_tokenizer, dataset[0]) == "<unk> is a token<|im_end|>"
    assert report.respelled == 1


def test_a_control_token_in_a_message_stays_text(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    rows = located(turns("say <|im_end|> and </s>", "<s>ok<|im_start|>"), turns("q", "a"))
    dataset, report = prepare_rows(rows, make_spec(), tiny_tokenizer)
    ids = [tiny_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "</s>", "<s>")]
    assert [int(np.sum(dataset[0].input_ids == number)) for number in ids] == [2, 2, 0, 1]
    assert decode(tiny_tokenizer, dataset[0].input_ids).count("<|im_end|>") == 3
    assert report.respelled == 1


def test_a_control_token_that_cannot_be_taken_apart_costs_the_row(make_spec: SpecMaker, merging_tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokens that a tokenizer knows without calling them special are never split."""
    tokenizer = with_tokens(merging_tokenizer, special=False)
    _, report = prepare_rows(located(turns("say <|im_end|>", "a"), turns("q", "a")), make_spec(), tokenizer)
    assert (report.kept, report.skipped) == (1, {"text spells a control token": 1})


def test_train_on_source_trains_on_everything_but_bos(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    example = prepare_rows(located(turns("q", "a")), make_spec(template="guanaco", train_on_source=True), tiny_tokenizer)[0][0]
    assert example.labels[0] == IGNORED
    assert decode(tiny_tokenizer, example.labels[1:]) == "### Human: q### Assistant: a</s>"


def test_what_follows_the_last_answer_is_left_out(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    dataset, _ = prepare_rows(located(turns("q", "a", "never answered")), make_spec(), tiny_tokenizer)
    assert decode(tiny_tokenizer, dataset[0].input_ids).endswith("assistant\na<|im_end|>")


def test_the_report_accounts_for_every_row(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    rows = located(turns("q", "a"), turns("q", "a" * 500), turns("q", ""), turns("q", "a" * 20), turns("q"))
    dataset, report = prepare_rows(rows, make_spec(template="guanaco", max_length=100, target_max_length=400), tiny_tokenizer)
    assert (report.rows, report.kept, len(dataset)) == (5, 2, 2)
    assert report.skipped == {"longer than max_length": 1, "empty answer": 1, "no answer": 1}
    assert report.truncated == 0  # the one that was cut to 400 was dropped for 100
    assert dataset.lengths.tolist() == [30, 49]  # one token a letter: 28 of prompt, answer, end
    assert (report.length_min, report.length_median, report.length_max) == (30, 39.5, 49)
    assert (report.tokens, report.supervised_tokens) == (79, 3 + 22)


def test_a_cut_answer_ends_with_its_end_token_and_is_counted(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    spec = make_spec(template="alpaca", source_max_length=300, target_max_length=10)
    row = {"instruction": "i" * 400, "output": "o" * 40}
    dataset, report = prepare_rows(located(row), spec, tiny_tokenizer)
    assert supervised(tiny_tokenizer, dataset[0]) == " " + "o" * 8 + "</s>"
    text = decode(tiny_tokenizer, dataset[0].input_ids)
    assert text.startswith("<s>Below is an instruction")
    assert "iiii\n\n### Response: oo" in text  # what ends the question stays when the question itself is cut
    assert (dataset.lengths[0], report.truncated) == (310, 1)


def test_when_no_row_is_left_the_error_says_why(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    rows = located(turns("q", ""), turns("q", "a" * 99))
    with pytest.raises(
        UserError, match="no row of the data set is left to use: 1 empty answer, 1 longer than max_length, of 2 rows; correct"
    ):
        prepare_rows(rows, make_spec(max_length=50), tiny_tokenizer)
    with pytest.raises(UserError, match="1 no supervised token left after truncation, of 1 rows"):
        prepare_rows(located(turns("q" * 99, "a")), make_spec(max_length=50, truncation="right"), tiny_tokenizer)


def test_a_slow_tokenizer_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="need a fast tokenizer with character offsets, got TokenizersBackend"):
        Encoder.of(tiny_tokenizer, TemplateRenderer(TEMPLATES["guanaco"], "<s>", "</s>"))


def test_a_token_belongs_to_the_span_in_which_it_starts() -> None:
    """An end token that takes the line end behind it along (some do) is still the answer's."""
    ids, starts, ends = np.array([[1, 2, 3, 4], [0, 4, 6, 9], [4, 6, 9, 10]], dtype=np.int32)
    tokens = Encoded(ids, starts, ends, respelled=False)
    mask, straddling = answer_mask(tokens, [(4, 8)])
    assert (mask.tolist(), straddling) == ([False, True, True, False], 0)
    assert answer_mask(tokens, [(5, 8)])[1] == 1


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("llama3", "gemma")])
def test_a_cut_question_is_still_closed(tiny_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker, template: str) -> None:
    """Without its end of turn, or [/INST], the answer would go on with the question."""
    rows = located(turns("Q" * 400, "a"), turns("Q", "a"))
    (cut, whole), report = prepare_rows(rows, make_spec(template=template, source_max_length=200), tiny_tokenizer)
    assert report.truncated == 1
    behind = [decode(tiny_tokenizer, example.input_ids).rpartition("Q")[2] for example in (cut, whole)]
    assert behind[0] == behind[1]


def test_an_unknown_character_is_no_control_token(sentencepiece_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    """It becomes the unknown token, and the row stays."""
    dataset, report = prepare_rows(located(turns("木?", "木")), make_spec(template="guanaco"), sentencepiece_tokenizer)
    assert np.sum(dataset[0].input_ids == sentencepiece_tokenizer.unk_token_id) == 2
    assert (report.kept, report.respelled, report.skipped) == (1, 0, {})


def test_a_unigram_model_that_reads_control_tokens_in_plain_text_costs_the_row(make_spec: SpecMaker) -> None:
    """Converted models score theirs above all words, so that they cannot be taken apart."""
    tokenizer = fast_tokenizer(unigram_backend(SPECIAL, score=0.0))
    _, report = prepare_rows(located(turns("say </s>", "a"), turns("q", "a")), make_spec(), tokenizer)
    assert (report.kept, report.skipped) == (1, {"text spells a control token": 1})


def test_a_prompt_that_cannot_be_asked_is_refused(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_tokens(merging_tokenizer, special=False)
    renderer = load_renderer("chatml", tokenizer)
    prompts = [renderer.prompt(conversation(text)) for text in ("Hi", "say <|im_end|>")]
    assert len(encode_prompts(Encoder.of(tokenizer, renderer), prompts[:1])) == 1
    with pytest.raises(UserError, match=r"a prompt spells a control token of the tokenizer, which cannot be kept as text: '<s><\|im_start"):
        encode_prompts(Encoder.of(tokenizer, renderer), prompts)


def with_tokens(tokenizer: PreTrainedTokenizerFast, **options: bool) -> PreTrainedTokenizerFast:
    """The tokenizer with other attributes of ``<|im_start|>`` and ``<|im_end|>``."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token.update(options if token["content"].startswith("<|") else {})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>")


def test_tokens_that_take_blanks_along(merging_tokenizer: PreTrainedTokenizerFast, make_spec: SpecMaker) -> None:
    """Phi's tokens take what follows, others what comes before them: an end token is the answer's, with the blanks that it took."""
    for options, answer in (({"rstrip": True}, "a "), ({"lstrip": True}, "a")):
        tokenizer = with_tokens(merging_tokenizer, **options)
        dataset, report = prepare_rows(located(turns("q", "a ", "q", "a ")), make_spec(), tokenizer)
        assert [run.decode() for run in supervised_runs(tokenizer, dataset[0])] == [answer + "<|im_end|>"] * 2
        assert (report.straddling_tokens, report.respelled, report.lost_ends) == (0, 0, 0)


# compat: paper


def authors_example(
    tokenizer: PreTrainedTokenizerFast, source: str, target: str, source_max_len: int, target_max_len: int
) -> tuple[list[int], list[int]]:
    """The data collator of the QLoRA authors' code, said again: token ids, and labels without the source."""
    ids = {"add_special_tokens": False, "truncation": True}
    source_ids = tokenizer(f"{tokenizer.bos_token}{source}", max_length=source_max_len, **ids)["input_ids"]
    target_ids = tokenizer(f"{target}{tokenizer.eos_token}", max_length=target_max_len, **ids)["input_ids"]
    return source_ids + target_ids, [IGNORED] * len(source_ids) + target_ids


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(("source_limit", "target_limit"), [(None, None), (20, None), (None, 7), (9, 7), (1, 1)])
def test_paper_examples_are_the_authors(make_spec: SpecMaker, kind: str, source_limit: int | None, target_limit: int | None) -> None:
    """Source and target apart, each cut at its right, the end token too, and rows without an answer kept."""
    tokenizer = fast_tokenizer(BACKENDS[kind](SPECIAL))
    pairs = [("What is the river?", "The river is Elbe."), ("The ri", "ver"), ("q ", " a"), ("q", "é木 user\n"), ("The river? " * 9, "x")]
    rows = located(*({"prompt": source, "response": target} for source, target in pairs))
    spec = make_spec(compat="paper", source_max_length=source_limit, target_max_length=target_limit)
    dataset, report = prepare_rows(rows, spec, tokenizer)
    expected = [authors_example(tokenizer, *pair, source_limit or 999, target_limit or 999) for pair in pairs]
    assert [(ids.tolist(), labels.tolist()) for ids, labels in dataset] == expected
    lost = sum(tokenizer.eos_token_id not in labels for _, labels in expected)
    assert report.lost_ends == lost
    assert (lost > 0) == (target_limit is not None)
    assert report.straddling_tokens == 0


def test_paper_texts_without_a_source_are_trained_on_whole(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """BOS is then all of the source: what the human says is learned too."""
    text = "### Human: q### Assistant: a"
    dataset, report = prepare_rows(located({"text": text}), make_spec(compat="paper", source_max_length=16), tiny_tokenizer)
    assert dataset[0].labels.tolist() == [IGNORED, *tiny_tokenizer(text + "</s>", add_special_tokens=False)["input_ids"]]
    assert dataset.columns["source_tokens"].tolist() == [1]
    assert (report.lost_ends, report.truncated) == (0, 0)


def test_a_paper_target_that_is_cut_away_leaves_no_example(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Only where the tokenizer has no BOS can the first token be a target's; nothing predicts it."""
    tokenizer = fast_tokenizer(BACKENDS["bytes"](SPECIAL))
    tokenizer.bos_token = None
    rows = located({"prompt": "", "response": "abc"}, {"prompt": "q", "response": "abc"})
    dataset, report = prepare_rows(rows, make_spec(compat="paper", target_max_length=1), tokenizer)
    assert len(dataset) == 1
    assert report.skipped == {"no supervised token left after truncation": 1}


def test_a_control_token_in_a_paper_text_stays_text(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Here the authors' code is not followed: a spelled </s> ended texts in their middle."""
    dataset, report = prepare_rows(located({"prompt": "q</s>", "response": "a</s>b"}), make_spec(compat="paper"), tiny_tokenizer)
    ids = dataset[0].input_ids.tolist()
    assert (ids.count(tiny_tokenizer.bos_token_id), ids.count(tiny_tokenizer.eos_token_id)) == (1, 1)
    assert decode(tiny_tokenizer, ids) == "<s>q</s>a</s>b</s>"
    assert report.respelled == 1
