"""``chat``: talk to an adapter."""

import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import TextStreamer

from qlora_lightning.console import console, harmless, say
from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.generation import Assistant, GenerationSpec, load_assistant

HELP = "Type a question. /clear forgets the conversation, /quit (or Ctrl-D) ends it."


def chat(
    adapter: str | None = None,
    base_model: str | None = None,
    template: str | None = None,
    system_prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> None:
    """Talk to a base model with an adapter; questions are read from standard input, answers appear as they are written.

    Args:
        adapter: Adapter folder, as in runs/quickstart/checkpoints/last; without one the base model answers.
        base_model: Base model; by default the one that the adapter was trained on.
        template: Prompt template; by default the one that the adapter was trained with.
        system_prompt: Said before the conversation; by default the one that the adapter was trained with.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Seed of the sampling.
    """
    spec = GenerationSpec(max_new_tokens, temperature, top_p, seed)
    assistant, metadata = load_assistant(Path(adapter) if adapter else None, base_model, template)
    system = system_prompt if system_prompt is not None else metadata.get("system_prompt")
    opening = [Message("system", system)] if system else []
    say(HELP)
    conversation = list(opening)
    for line in _lines():
        if line in ("/quit", "/exit"):
            return
        if line == "/clear":
            conversation = list(opening)
            continue
        conversation.append(Message("user", line))
        conversation.append(Message("assistant", _stream(assistant, conversation, spec)))


class _HarmlessStreamer(TextStreamer):
    """Prints an answer as it comes; what a model writes is not to steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(harmless(text), stream_end)


def _lines() -> Iterator[str]:
    """Questions, without blank ones; a mark is shown where a person types them."""
    while True:
        if sys.stdin.isatty():
            console.print("\n[bold]you>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip().encode("utf-8", "replace").decode()  # bytes that are no UTF-8 come as halves of surrogate pairs


def _stream(assistant: Assistant, conversation: Conversation, spec: GenerationSpec) -> str:
    ids, mask = assistant.encode([conversation])
    streamer = _HarmlessStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return assistant.complete(ids, mask, spec, numbers=[len(conversation)], streamer=streamer)[0].generation
