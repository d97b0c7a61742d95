"""The tokenizer's own chat template: its text to the letter, and spans that nobody had to search for."""

import pytest
from making import (
    BACKENDS,
    CHATML_CHAT,
    GEMMA_CHAT,
    LLAMA3_CHAT,
    MARKS,
    QWEN3_CHAT,
    SPECIAL,
    ZEPHYR_CHAT,
    conversation,
    fast_tokenizer,
    located,
    prepare_rows,
    turns,
)
from test_rendering import TURNS
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.chat_template import ChatTemplateRenderer
from qlora_lightning.data.rendering import load_renderer
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.errors import UserError

CHATS = {"chatml": CHATML_CHAT, "llama3": LLAMA3_CHAT, "zephyr": ZEPHYR_CHAT, "qwen3": QWEN3_CHAT, "gemma": GEMMA_CHAT}
SUPERVISED = {
    "chatml": ["a1<|im_end|>", "a2<|im_end|>"],
    "llama3": ["a1<|eot_id|>", "a2<|eot_id|>"],
    "zephyr": ["a1</s>", "a2</s>"],
    "qwen3": ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"],
    "gemma": ["a1<end_of_turn>", "a2<end_of_turn>"],
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": "</s>", "qwen3": "<|im_end|>", "gemma": "<end_of_turn>"}


def tokenizer_with(chat: str | None) -> PreTrainedTokenizerFast:
    special = [*SPECIAL, *MARKS]
    return fast_tokenizer(BACKENDS["bytes"](special), special[4:], chat_template=chat)


@pytest.mark.parametrize("name", CHATS)
def test_the_text_is_what_transformers_makes_of_it(name: str) -> None:
    tokenizer = tokenizer_with(CHATS[name])
    rendering = load_renderer("tokenizer", tokenizer).render(TURNS)
    messages = [{"role": m.role, "content": f"{m.content}\n\n{m.context}" if m.context else m.content} for m in TURNS]
    assert rendering is not None
    assert rendering.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [rendering.text[start:end] for start, end in rendering.supervised] == SUPERVISED[name]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert load_renderer("tokenizer", tokenizer).prompt(TURNS).text == prompt == rendering.text[: rendering.supervised[-1][0]]


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_ends_with_the_first_special_token_behind_it(name: str) -> None:
    assert load_renderer("tokenizer", tokenizer_with(CHATS[name])).end_tokens == list(dict.fromkeys([ENDS[name], "</s>"]))


@pytest.mark.parametrize(("name", "bos"), [("chatml", False), ("llama3", True), ("zephyr", False), ("gemma", True)])
def test_bos_is_the_templates_own(name: str, bos: bool) -> None:
    rendering = load_renderer("tokenizer", tokenizer_with(CHATS[name])).render(TURNS)
    assert rendering is not None
    assert (rendering.bos, rendering.text.count("<s>")) == (bos, int(bos))


def test_what_only_an_answer_at_the_end_begins_with_is_learned() -> None:
    """The prompt at inference ends before the thoughts, so that the model must write them."""
    rendering = load_renderer("tokenizer", tokenizer_with(QWEN3_CHAT)).render(conversation("q", "a"))
    assert rendering is not None
    assert rendering.text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n"
    assert [rendering.text[start:end] for start, end in rendering.supervised] == ["<think>\n\n</think>\n\na<|im_end|>"]


def test_stripped_messages_are_trained_on_as_they_are_written() -> None:
    rendering = load_renderer("tokenizer", tokenizer_with(LLAMA3_CHAT)).render(conversation(" q\n", "\n a b \n"))
    assert rendering is not None
    assert [rendering.text[start:end] for start, end in rendering.supervised] == ["a b<|eot_id|>"]


def test_marks_of_the_skeleton_in_a_message_are_text() -> None:
    rendering = load_renderer("tokenizer", tokenizer_with(CHATML_CHAT)).render(conversation("\ue0001\ue001", "\ue0000\ue001"))
    assert rendering is not None
    assert [rendering.text[start:end] for start, end in rendering.supervised] == ["\ue0000\ue001<|im_end|>"]


@pytest.mark.parametrize("change", ["message.content | upper", "message.content | replace('b', '')", "message.content | lower | trim"])
def test_a_template_that_changes_a_message_costs_the_row(change: str) -> None:
    """No span of it would be true. Rows that it leaves as they are stay."""
    tokenizer = tokenizer_with(CHATML_CHAT.replace("message.content", f"({change})"))
    rows = located(turns("aB", "b"), turns("1", "2"))
    dataset, report = prepare_rows(rows, DatasetSpec(path=DataPath("rows.jsonl"), template="tokenizer"), tokenizer)
    assert report.skipped == {"chat template rewrites a message": 1}
    assert len(dataset) == 1
    with pytest.raises(UserError, match="the tokenizer's chat template changes what a message says; use another --template"):
        load_renderer("tokenizer", tokenizer).prompt(conversation("aBb"))


def test_a_refused_system_message_is_an_error_that_names_the_row() -> None:
    spec = DatasetSpec(path=DataPath("rows.jsonl"), template="tokenizer")
    rows = located(turns("q", "a"), turns("q", "a", system="Be brief."))
    with pytest.raises(UserError) as error:
        prepare_rows(rows, spec, tokenizer_with(GEMMA_CHAT))
    assert str(error.value) == (
        "rows.jsonl:2: the tokenizer's chat template refuses the turns system, user, assistant (System role not supported); "
        "leave out the system message or name another template"
    )


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "needs a base model whose tokenizer brings a chat template, but this one has none; name a template"),
        ("{{ messages[0].content }}", "does not write each of the messages user, assistant once; name another"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            "ends an answer with no special token, so that a model trained with it would never stop; name another",
        ),
        ("{{ raise_exception('no') }}", "refuses the turns user, assistant (no); leave out"),
        ("{% for m in %}", "refuses the turns user, assistant"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_at_once(chat: str | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        ChatTemplateRenderer(tokenizer_with(chat))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_date_in_a_template_is_not_todays() -> None:
    """The same rows give the same tokens every day."""
    chat = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}" + CHATML_CHAT
    rendering = load_renderer("tokenizer", tokenizer_with(chat)).render(conversation("q", "a"))
    assert rendering is not None
    assert rendering.text.startswith("26 Jul 2024<|im_start|>user")


def test_a_template_is_rendered_once_for_each_sequence_of_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the one rendering of each row that its text is compared with."""
    renderer, calls = load_renderer("tokenizer", tokenizer_with(CHATML_CHAT)), []
    apply = PreTrainedTokenizerFast.apply_chat_template
    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", lambda self, *a, **k: calls.append(1) or apply(self, *a, **k))
    for number in range(10):
        renderer.render(conversation("q", f"a{number}"))
    assert len(calls) == 10
