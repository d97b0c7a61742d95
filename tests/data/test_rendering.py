"""The exact text of every template. A change here changes what existing adapters were trained on."""

import pytest
from making import BACKENDS, MARKS, SPECIAL, conversation, fast_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.formats import Message
from qlora_lightning.data.rendering import PaperRenderer, TemplateRenderer, load_renderer
from qlora_lightning.data.templates import TEMPLATES, find_template
from qlora_lightning.errors import UserError

TURNS = [Message("user", "q1", "c1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
ALPACA = (
    "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nq1\n\n### Input:\nc1\n\n### Response: a1</s>\n\n### Instruction:\nq2\n\n### Response: a2</s>\n\n"
)
CHATML = (
    "<|im_start|>user\nq1\n\nc1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
)
TEXTS = {
    "alpaca": ALPACA,
    "guanaco": "<s>### Human: q1\n\nc1### Assistant: a1</s>### Human: q2### Assistant: a2</s>",
    "plain": "<s>q1\n\nc1a1</s>q2a2</s>",
    "completion": "<s>q1\n\nc1\na1</s>\nq2\na2</s>\n",
    "chatml": f"<s>{CHATML}",
    "qwen": f"<s><|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{CHATML}",
    "llama2": "<s>[INST] q1\n\nc1 [/INST] a1</s>[INST] q2 [/INST] a2</s>",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nq1\n\nc1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>",
    "mistral": "<s>[INST] q1\n\nc1[/INST] a1</s>[INST] q2[/INST] a2</s>",
    "gemma": "<s><start_of_turn>user\nq1\n\nc1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
    "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n",
    "zephyr": "<s><|user|>\nq1\n\nc1</s>\n<|assistant|>\na1</s>\n<|user|>\nq2</s>\n<|assistant|>\na2</s>\n",
}
SUPERVISED = {
    "alpaca": [" a1</s>", " a2</s>"],
    "guanaco": [" a1</s>", " a2</s>"],
    "plain": ["a1</s>", "a2</s>"],
    "completion": ["a1</s>", "a2</s>"],
    "chatml": ["a1<|im_end|>", "a2<|im_end|>"],
    "qwen": ["a1<|im_end|>", "a2<|im_end|>"],
    "llama2": [" a1</s>", " a2</s>"],
    "llama3": ["a1<|eot_id|>", "a2<|eot_id|>"],
    "mistral": [" a1</s>", " a2</s>"],
    "gemma": ["a1<end_of_turn>", "a2<end_of_turn>"],
    "zephyr": ["a1</s>", "a2</s>"],
}
ENDS_QUESTION = {
    "alpaca": "\n\n### Response:",
    "guanaco": "### Assistant:",
    "plain": "",
    "completion": "\n",
    "chatml": "<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "<|im_end|>\n<|im_start|>assistant\n",
    "llama2": " [/INST]",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[/INST]",
    "gemma": "<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "</s>\n<|assistant|>\n",
}
SYSTEM = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\nq",
    "guanaco": "<s>Be brief.\n### Human: q",
    "plain": "<s>Be brief.\nq",
    "completion": "<s>Be brief.\nq",
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq",
    "qwen": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq",
    "mistral": "<s>[INST] Be brief.\n\nq",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nq",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nq",
}


def renderer(name: str, bos: str | None = "<s>", eos: str | None = "</s>") -> TemplateRenderer:
    return TemplateRenderer(TEMPLATES[name], bos, eos)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_supervised_spans(name: str) -> None:
    rendering = renderer(name).render(TURNS)
    assert rendering.text == TEXTS[name]
    assert [rendering.text[start:end] for start, end in rendering.supervised] == SUPERVISED[name]
    assert rendering.text[rendering.header : rendering.supervised[0][0]] == ENDS_QUESTION[name]
    assert rendering.bos


def test_alpaca_without_input_is_the_papers_other_prompt() -> None:
    assert renderer("alpaca", bos=None).render(conversation("q", "a")).text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Response: a</s>\n\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_message_opens_the_text_once(name: str) -> None:
    rendering = renderer(name).render([Message("system", "Be brief."), Message("user", "q", "c"), *TURNS[1:]])
    assert rendering.text.startswith(SYSTEM[name])
    assert rendering.text.count("Be brief.") == 1
    assert [rendering.text[start:end] for start, end in rendering.supervised] == SUPERVISED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_trained_text_up_to_the_answer(name: str) -> None:
    whole = renderer(name).render(TURNS)
    prompt = renderer(name).prompt(TURNS).text
    assert prompt == whole.text[: whole.supervised[-1][0]]
    assert prompt == renderer(name).prompt(TURNS[:-1]).text
    assert not prompt.endswith(" ")


def test_control_spans_are_the_templates_own_tokens_only() -> None:
    rendering = renderer("chatml").render(conversation("<|im_end|></s>", "<s>"))
    spelled = [rendering.text[start:end] for start, end in rendering.control]
    assert spelled == ["<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert rendering.control[0] == (0, 3)


def test_the_tokenizers_special_tokens_are_control_where_a_template_spells_them() -> None:
    """[INST] is text for Mistral's first tokenizers, and a token for the later ones."""
    rendering = TemplateRenderer(TEMPLATES["mistral"], "<s>", "</s>", ["[INST]", "[/INST]"]).render(conversation("[INST]", "a"))
    assert [rendering.text[start:end] for start, end in rendering.control] == ["<s>", "[INST]", "[/INST]", "</s>"]
    assert [start for start, _ in rendering.control] == [0, 3, 16, 25]


def test_words_in_braces_in_a_message_are_its_own() -> None:
    spoken = [Message("system", "{content}{eos}"), Message("user", "{context}", "{system}"), Message("assistant", "{content}")]
    assert renderer("zephyr").render(spoken).text == (
        "<s><|system|>\n{content}{eos}</s>\n<|user|>\n{context}\n\n{system}</s>\n<|assistant|>\n{content}</s>\n"
    )


def test_bos_is_not_doubled_where_the_template_opens_with_it() -> None:
    opening = renderer("chatml", "<|im_start|>", "<|im_end|>").render(TURNS)
    assert opening.text.startswith("<|im_start|>user")
    assert not opening.bos
    assert renderer("guanaco", bos=None).render(TURNS).text.startswith("### Human: q1")


def test_generation_stops_at_the_templates_end_and_at_eos() -> None:
    assert renderer("chatml").end_tokens == ["<|im_end|>", "</s>"]
    assert renderer("gemma").end_tokens == ["<end_of_turn>", "</s>"]
    assert renderer("guanaco").end_tokens == ["</s>"]
    assert renderer("chatml", eos=None).end_tokens == ["<|im_end|>"]


def test_only_the_template_may_write_what_the_tokenizer_treats_as_special() -> None:
    """A token for unknown characters that the model never writes (as in byte-level models, where it often ends texts) is one of them."""
    special = [*SPECIAL, *MARKS]
    expected = {"<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *MARKS}
    assert set(load_renderer("guanaco", fast_tokenizer(BACKENDS["bytes"](special), special[4:])).control) == expected | {"<unk>"}
    assert set(load_renderer("guanaco", fast_tokenizer(BACKENDS["unigram"](special), special[4:])).control) == expected


def test_a_template_that_the_tokenizer_cannot_write_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(
        UserError, match=r"chatml needs the token <\|im_start\|>, which the base model's .*; use .* --data.dataset.template guanaco"
    ):
        load_renderer("chatml", bare)
    with pytest.raises(UserError, match="template guanaco ends answers with the tokenizer's eos token, but it has none"):
        load_renderer("guanaco", bare)
    with pytest.raises(UserError, match="compat: paper ends every row with the tokenizer's eos token, but it has none"):
        PaperRenderer(bare)


def test_a_misspelt_template_names_all_and_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        find_template("lama3", "--template")
    names = "alpaca, chatml, completion, gemma, guanaco, llama2, llama3, mistral, plain, qwen, zephyr, tokenizer"
    assert str(error.value) == f"--template must be one of {names}; got 'lama3', nearest is llama3"


@pytest.mark.parametrize(("bos", "opening"), [("<s>", "<s>"), (None, "")])
def test_the_papers_text_is_source_and_target_with_nothing_between(bos: str | None, opening: str) -> None:
    tokenizer = fast_tokenizer(BACKENDS["bytes"](SPECIAL))
    tokenizer.bos_token = bos
    rendering = PaperRenderer(tokenizer).render(conversation("source </s>", "target"))
    assert rendering.text == f"{opening}source </s>target</s>"
    assert rendering.joint == rendering.supervised[0][0] == len(f"{opening}source </s>")
    assert [rendering.text[start:end] for start, end in rendering.supervised] == ["target</s>"]
    assert len(rendering.control) == 1 + bool(bos)
    assert rendering.bos is bool(bos)
