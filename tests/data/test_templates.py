"""The exact text of every template. A change here changes what existing adapters were trained on."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.formats import Message
from qlora_lightning.data.templates import TEMPLATES, check_template, end_tokens, render, render_prompt
from qlora_lightning.errors import UserError

TURNS = [Message("user", "q1", "c1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
ALPACA = (
    "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nq1\n\n### Input:\nc1\n\n### Response: a1</s>\n\n### Instruction:\nq2\n\n### Response: a2</s>\n\n"
)
TEXTS = {
    "alpaca": ALPACA,
    "guanaco": "<s>### Human: q1\n\nc1### Assistant: a1</s>### Human: q2### Assistant: a2</s>",
    "plain": "<s>q1\n\nc1a1</s>q2a2</s>",
    "chatml": "<s><|im_start|>user\nq1\n\nc1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n",
}
SUPERVISED = {
    "alpaca": [" a1</s>", " a2</s>"],
    "guanaco": [" a1</s>", " a2</s>"],
    "plain": ["a1</s>", "a2</s>"],
    "chatml": ["a1<|im_end|>", "a2<|im_end|>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_supervised_spans(name: str) -> None:
    rendering = render(TURNS, TEMPLATES[name], "<s>", "</s>")
    assert rendering.text == TEXTS[name]
    assert [rendering.text[start:end] for start, end in rendering.supervised] == SUPERVISED[name]


def test_alpaca_without_input_is_the_papers_other_prompt() -> None:
    assert render([Message("user", "q"), Message("assistant", "a")], TEMPLATES["alpaca"], None, "</s>").text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Response: a</s>\n\n"
    )


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("alpaca", "<s>Be brief.\n\n### Instruction:\nq"),
        ("guanaco", "<s>Be brief.\n### Human: q"),
        ("plain", "<s>Be brief.\nq"),
        ("chatml", "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq"),
    ],
)
def test_a_system_message_opens_the_text(name: str, opening: str) -> None:
    text = render([Message("system", "Be brief."), Message("user", "q", "c")], TEMPLATES[name], "<s>", "</s>").text
    assert text.startswith(opening)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_trained_text_up_to_the_answer(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = render(TURNS, TEMPLATES[name], "<s>", "</s>")
    prompt = render_prompt(TURNS, TEMPLATES[name], tiny_tokenizer).text
    assert prompt == whole.text[: whole.supervised[-1][0]]
    assert prompt == render_prompt(TURNS[:-1], TEMPLATES[name], tiny_tokenizer).text
    assert not prompt.endswith(" ")


def test_control_spans_are_the_templates_own_tokens_only() -> None:
    rendering = render([Message("user", "<|im_end|></s>"), Message("assistant", "<s>")], TEMPLATES["chatml"], "<s>", "</s>")
    spelled = [rendering.text[start:end] for start, end in rendering.control]
    assert spelled == ["<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert rendering.control[0] == (0, 3)


def test_bos_is_not_doubled_where_the_template_opens_with_it() -> None:
    assert render(TURNS, TEMPLATES["chatml"], "<|im_start|>", "<|im_end|>").text.startswith("<|im_start|>user")
    assert render(TURNS, TEMPLATES["guanaco"], None, "</s>").text.startswith("### Human: q1")


def test_generation_stops_at_the_templates_end_and_at_eos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert end_tokens(TEMPLATES["chatml"], tiny_tokenizer) == ["<|im_end|>", "</s>"]
    assert end_tokens(TEMPLATES["guanaco"], tiny_tokenizer) == ["</s>"]


def test_a_template_that_the_tokenizer_cannot_write_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(
        UserError, match=r"chatml needs the token <\|im_start\|>, which the base model's .*; use .* --data.dataset.template guanaco$"
    ):
        check_template("chatml", bare)
    with pytest.raises(UserError, match="template guanaco ends answers with the tokenizer's eos token, but it has none"):
        check_template("guanaco", bare)
