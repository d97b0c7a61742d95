"""Answers from any OpenAI-compatible server, for ``generate``."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qlora_lightning.answer_file import Answer
from qlora_lightning.data.formats import Conversation
from qlora_lightning.data.rendering import whole_text
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.endpoint import ChatRequest, Endpoint, EndpointSpec
from qlora_lightning.generation import GenerationSpec
from qlora_lightning.redaction import redacted


class ServerAnswerer:
    """A model behind a server, which writes conversations in a template of its own."""

    system_prompt: str | None = None

    def __init__(self, spec: EndpointSpec) -> None:
        self._spec = spec

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, as far as it can be known from here; it is written down, so no password in the address."""
        return {"base_url": redacted(self._spec.base_url), "server_model": self._spec.model}

    def answers(
        self, conversations: Mapping[int, Conversation], left: Collection[int], spec: GenerationSpec
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Answers to the conversations that are left as they come, one by one.

        Raises:
            UserError: the server refuses, or some requests failed for good; once all others are answered.
        """
        endpoint = Endpoint(self._spec)
        endpoint.check(*_drawing(spec))
        failures: list[str | None] = []
        for number, reply in endpoint.replies((number, request(conversations[number], spec, number)) for number in left):
            if reply.text is None:
                failures.append(reply.error)
            else:
                yield [(number, Answer(reply.text, reply.completion_tokens, reply.finish_reason or "unknown"))]
        if failures:
            raise UserError(
                f"{len(failures)} of {len(left)} requests failed, the last one with: {failures[-1]}; "
                "the same command (without --overwrite) asks them again and keeps the others"
            )


def request(conversation: Conversation, spec: GenerationSpec, number: int) -> ChatRequest:
    """What the server is asked. Servers draw an answer from one seed: it is the spec's and the prompt's number together."""
    said = [{"role": message.role, "content": whole_text(message)} for message in conversation]
    return ChatRequest(said, spec.max_new_tokens, *_drawing(spec), spec.seed + number if spec.temperature > 0 else None)


def _drawing(spec: GenerationSpec) -> tuple[float, float]:
    """Temperature and top-p."""
    return (spec.temperature, spec.top_p) if spec.temperature > 0 else (0.0, 1.0)
