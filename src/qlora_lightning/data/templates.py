"""Prompt styles by name. A template is data: what stands round a system message, a user's message and an answer.

``data/rendering.py`` writes conversations out with them. A style is never guessed from a model's name.
"""

import difflib
from dataclasses import dataclass

from qlora_lightning.errors import UserError

TOKENIZER = "tokenizer"
"""In place of a template's name: the chat template (Jinja) that comes with the base model's tokenizer."""


@dataclass(frozen=True)
class Template:
    """One prompt style. ``{content}``, ``{context}`` and ``{system}`` stand for a message's text, ``{eos}`` for the tokenizer's eos."""

    system: str
    user: str
    header: str
    """What opens an answer: the prompt at inference ends with it."""
    lead: str = ""
    """What the answer's text begins with. It belongs to the answer: most tokenizers join a blank to the word after it, so that a prompt
    with a blank at its end is followed at inference by tokens that training has never shown."""
    end: str | None = None
    """The token that ends an answer; None: the tokenizer's eos."""
    after: str = ""
    """What follows an ended answer; not trained on."""
    preamble: str = ""
    """In place of a system message, where the conversation has none."""
    user_with_context: str | None = None
    preamble_with_context: str | None = None
    user_with_system: str | None = None
    """The first user's message together with the system message, in styles that have no turn for the latter; ``system`` is then unused."""
    control: tuple[str, ...] = ()
    """Tokens of this template that the tokenizer must know as single tokens."""


_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"


def _chatml(preamble: str = "") -> Template:
    return Template(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        preamble=preamble,
        user="<|im_start|>user\n{content}<|im_end|>\n",
        header="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        control=("<|im_start|>", "<|im_end|>"),
    )


TEMPLATES: dict[str, Template] = {
    # The two prompts of Stanford Alpaca, which the QLoRA paper took over. There the prompt ends in "### Response: " with the blank;
    # here the text is the same, but the blank opens the answer (see ``Template.lead``).
    "alpaca": Template(
        system="{content}\n\n",
        preamble=f"{_ALPACA_TASK}. {_ALPACA_REQUEST}",
        preamble_with_context=f"{_ALPACA_TASK}, paired with an input that provides further context. {_ALPACA_REQUEST}",
        user="### Instruction:\n{content}\n\n",
        user_with_context="### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
        header="### Response:",
        lead=" ",
        after="\n\n",
    ),
    # The text form in which the QLoRA authors published their OASST1 subset. Theirs has one eos at the very end; here every answer ends
    # with one, so that the model learns to hand the turn back.
    "guanaco": Template(system="{content}\n", user="### Human: {content}", header="### Assistant:", lead=" "),
    # Nothing but the texts: for sets whose rows bring their own separators.
    "plain": Template(system="{content}\n", user="{content}", header=""),
    # Prompt and answer on lines of their own, so that no token can join the two.
    "completion": Template(system="{content}\n", user="{content}", header="\n", after="\n"),
    "chatml": _chatml(),
    # Qwen 2 and 2.5: their own chat template brings this system message where the conversation has none. Qwen 3: chatml, or tokenizer.
    "qwen": _chatml("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"),
    # Meta's reference code opens every turn with BOS; here there is one BOS, at the beginning.
    "llama2": Template(
        system="",
        user="[INST] {content} [/INST]",
        user_with_system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
        header="",
        lead=" ",
    ),
    "llama3": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Mistral Instruct v0.3; the marks are text for the tokenizers of v0.1 and v0.2, control tokens since.
    "mistral": Template(
        system="", user="[INST] {content}[/INST]", user_with_system="[INST] {system}\n\n{content}[/INST]", header="", lead=" "
    ),
    "gemma": Template(
        system="",
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        user_with_system="<start_of_turn>user\n{system}\n\n{content}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        end="<end_of_turn>",
        after="\n",
        control=("<start_of_turn>", "<end_of_turn>"),
    ),
    "zephyr": Template(system="<|system|>\n{content}{eos}\n", user="<|user|>\n{content}{eos}\n", header="<|assistant|>\n", after="\n"),
}


def find_template(name: str, option: str = "template") -> Template | None:
    """The template of that name, None for the tokenizer's own; ``option`` is where the user wrote it.

    Raises:
        UserError: there is none; the line names all and the nearest.
    """
    if name == TOKENIZER:
        return None
    if name not in TEMPLATES:
        names = [*sorted(TEMPLATES), TOKENIZER]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"{option} must be one of {', '.join(names)}; got {name!r}, nearest is {near}")
    return TEMPLATES[name]
