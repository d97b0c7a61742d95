"""Our prompt styles in Jinja write, to the character, what was trained on."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.data.rendering import TemplateRenderer
from qlora_lightning.data.templates import TEMPLATES
from qlora_lightning.export.chat_jinja import chat_template

TURNS = [("user", "What's {{ 1 + 1 }}?\n"), ("assistant", ' "two" \\ '), ("user", "{content}"), ("assistant", "% }}")]
CONVERSATIONS = {
    "one question": TURNS[:1],
    "two turns": TURNS,
    "with a system message": [("system", "Be\nbrief. "), *TURNS],
    "a system message and one question": [("system", "Be brief."), *TURNS[:1]],
}


def conversation(turns: list[tuple[str, str]]) -> Conversation:
    return tuple(Message(role, content) for role, content in turns)  # type: ignore[return-value, arg-type]


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_in_training(tiny_base: Path, name: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_base)
    template = TEMPLATES[name]
    renderer = TemplateRenderer(template, tokenizer.bos_token, tokenizer.eos_token)
    tokenizer.chat_template = chat_template(template, opens_with_bos=True, system_prompt=None)
    messages = [{"role": role, "content": content} for role, content in turns]
    asks = turns[-1][0] == "user"
    expected = renderer.prompt(conversation(turns)) if asks else renderer.render(conversation(turns))
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks) == expected.text


@pytest.mark.parametrize("name", ["chatml", "llama2", "alpaca"])
def test_the_system_prompt_of_the_training_is_said_unless_there_is_another(tiny_base: Path, name: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_base)
    renderer = TemplateRenderer(TEMPLATES[name], tokenizer.bos_token, tokenizer.eos_token)
    tokenizer.chat_template = chat_template(TEMPLATES[name], opens_with_bos=True, system_prompt="Be kind.")
    for system in ("Be kind.", "Be rude."):
        turns = [("system", system), *TURNS]
        messages = [{"role": role, "content": content} for role, content in (TURNS if system == "Be kind." else turns)]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == renderer.render(conversation(turns)).text
