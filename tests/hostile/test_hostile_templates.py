"""A chat template is a program that came with a base model: it may write text, within limits, and nothing else."""

import contextlib
import copy
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data import chat_template
from qlora_lightning.data.chat_template import ChatTemplateRenderer
from qlora_lightning.data.formats import Message
from qlora_lightning.errors import UserError

GOOD = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [Message("user", "Hello"), Message("assistant", "Hi")]


def renderer(tokenizer: PreTrainedTokenizerFast, template: str) -> ChatTemplateRenderer:
    """A renderer with that template."""
    hostile = copy.deepcopy(tokenizer)
    hostile.chat_template = template
    return ChatTemplateRenderer(hostile)


def line(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """What a user is told of a template that is refused."""
    with pytest.raises(UserError) as refused:
        renderer(tokenizer, template)
    return str(refused.value)


@pytest.mark.parametrize(
    "escape",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__",
        "''|attr('__class__')",
        "raise_exception.__globals__['os'].system('touch CANARY')",
        "self._TemplateReference__context",
        "cycler.__init__.__globals__.os.popen('touch CANARY').read()",
        "'{0.__class__.__init__.__globals__}'.format(raise_exception)",
        "messages.append({'role': 'user', 'content': 'more'})",
    ],
)
def test_a_template_reaches_nothing_of_python(escape: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = escape.replace("CANARY", str(tmp_path / "canary"))
    with contextlib.suppress(UserError):  # some are refused, the others find nothing
        escaped = renderer(tiny_tokenizer, GOOD + "{{ " + found + " }}").render(TURNS)
        assert escaped is not None and escaped.text == renderer(tiny_tokenizer, GOOD).render(TURNS).text  # type: ignore[union-attr]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("loader", ["{% include '/etc/passwd' %}", "{% import '/etc/passwd' as words %}", "{% extends '/etc/passwd' %}"])
def test_a_template_reads_no_file(loader: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "refuses the turns" in line(tiny_tokenizer, GOOD + loader)


def test_a_loop_without_end_is_cut(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    assert "it took longer than 0.5 s" in line(tiny_tokenizer, GOOD + endless)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "hoard",
    [
        "'a' * 10000000000",
        "['a'] * 10000000000",
        "'a'|center(10000000000)",
        "'%9999999999d' % 1",
        "'{:>9999999999}'.format(1)",
        "lists * 1000000000",
    ],
)
def test_memory_is_bounded(hoard: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "refuses the turns" in line(tiny_tokenizer, GOOD + "{% set lists = [1] %}{% set x = " + hoard + " %}")


def test_a_text_that_doubles_is_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    doubling = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    assert "refuses the turns" in line(tiny_tokenizer, GOOD + doubling)


def test_words_are_bounded(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "may add 1,000,000 characters at most" in line(tiny_tokenizer, GOOD + "{{ 'a' * 5000000 }}")


def test_a_range_is_bounded_by_the_sandbox(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "Range too big" in line(tiny_tokenizer, GOOD + "{% for i in range(10000000000) %}{% endfor %}")


@pytest.mark.parametrize("word", ["{{ 9 ** 9 ** 9 ** 9 }}", "{{ ['a', 'b'] | random }}", "{{ 1 | round(-1000000000) }}", "{{ lipsum() }}"])
def test_what_never_ends_in_one_call_or_differs_is_refused_unrun(word: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "which no template needs and a hostile one could" in line(tiny_tokenizer, GOOD + word)


def test_words_of_a_message_are_not_taken_for_the_templates(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A template may say `random` and `**` in what it writes."""
    assert renderer(tiny_tokenizer, "Be random, **bold**, lipsum." + GOOD).render(TURNS) is not None


def test_words_that_differ_each_time_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "writes other words each time" in line(tiny_tokenizer, "{{ strftime_now('%f') }}" + GOOD)


def test_a_refusal_of_the_template_is_one_short_line(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    told = line(tiny_tokenizer, "{{ raise_exception('no\n' * 100000) }}")
    assert "\n" not in told and len(told) < 500


def test_a_template_that_is_no_jinja_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "chat template" in line(tiny_tokenizer, "{% for %}{{ }")


def test_messages_are_text_and_never_a_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spoken = [Message("user", "{{ 7 * 6 }}{% raw %}"), Message("assistant", "{{ messages }}")]
    rendering = renderer(tiny_tokenizer, GOOD).render(spoken)
    assert rendering is not None and "{{ 7 * 6 }}{% raw %}" in rendering.text and "{{ messages }}" in rendering.text
