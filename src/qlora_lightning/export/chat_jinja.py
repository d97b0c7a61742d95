"""A prompt style of ours as a chat template in Jinja, so that whatever loads the merged model asks it as it was trained."""

import json
import re

from qlora_lightning.data.templates import Template

_PLACES = {"content": "message['content']", "system": "opening.system", "eos": "eos_token"}


def chat_template(template: Template, opens_with_bos: bool, system_prompt: str | None) -> str:
    """What ``TemplateRenderer`` writes, as a Jinja template over ``messages`` and ``add_generation_prompt``.

    Args:
        template: The style.
        opens_with_bos: Whether the text begins with the tokenizer's BOS.
        system_prompt: What is said where a conversation brings no system message of its own.
    """
    default = "none" if system_prompt is None else _quoted(system_prompt)
    own = "messages and messages[0]['role'] == 'system'"
    turns = (
        "{% if message['role'] == 'user' %}"
        + _ask(template)
        + "{% elif message['role'] == 'assistant' %}"
        + _answer(template)
        + "{% endif %}"
    )
    parts = [
        "{{ bos_token }}" if opens_with_bos else "",
        f"{{% set opening = namespace(system=messages[0]['content'] if {own} else {default}) %}}",
        _open(template),
        "{% for message in messages %}" + turns + "{% endfor %}",
        "{% if add_generation_prompt %}" + _filled(template.header) + "{% endif %}",
    ]
    return "".join(parts)


def _open(template: Template) -> str:
    if template.user_with_system is not None:
        return "{% if opening.system is none %}" + _filled(template.preamble) + "{% endif %}"
    with_system = _filled(template.system.replace("{content}", "{system}"))
    return "{% if opening.system is none %}" + _filled(template.preamble) + "{% else %}" + with_system + "{% endif %}"


def _ask(template: Template) -> str:
    if template.user_with_system is None:
        return _filled(template.user)
    first = _filled(template.user_with_system) + "{% set opening.system = none %}"
    return "{% if opening.system is not none %}" + first + "{% else %}" + _filled(template.user) + "{% endif %}"


def _answer(template: Template) -> str:
    end = _filled("{eos}") if template.end is None else _filled(template.end)
    return _filled(template.header) + _filled(template.lead) + "{{ message['content'] }}" + end + _filled(template.after)


def _filled(pattern: str) -> str:
    """Words of the style, with expressions at the places of its texts. No text stands outside an expression, where blanks may get lost."""
    parts = re.split(r"\{(content|system|eos)\}", pattern)
    return "".join("{{ " + (_PLACES[part] if n % 2 else _quoted(part)) + " }}" for n, part in enumerate(parts) if part)


def _quoted(text: str) -> str:
    return json.dumps(text)
