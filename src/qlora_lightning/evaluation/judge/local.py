"""A judge that runs in this process: a base model, with an adapter or without."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from qlora_lightning.answering_local import LocalAnswerer
from qlora_lightning.data.rows import Message, Role
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.endpoint import ChatReply, ChatRequest
from qlora_lightning.evaluation.judge.judging import Asking
from qlora_lightning.generation import GenerationSpec


class LocalJudge:
    """Answers requests in batches, all drawn in the same way, whatever a request says of it.

    Args:
        adapter: A PEFT adapter folder; None for the base alone.
        base: The base; by default the one that the adapter names.
        template: Prompt template; by default the one that the adapter was trained with.
        asking: How verdicts are asked for.
        batch_size: Requests answered at once.
    """

    def __init__(self, adapter: str | None, base: str | None, template: str | None, asking: Asking, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}; leave it out for 4")
        self._answerer = LocalAnswerer(Path(adapter) if adapter else None, base, template, None, batch_size)
        self._spec = GenerationSpec(asking.max_tokens, asking.temperature, top_p=1.0)

    def identity(self) -> dict[str, Any]:
        """The files of the model, and how it is asked and held."""
        return self._answerer.identity()

    def load(self) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be.
        """
        self._answerer.load()

    def replies(self, requests: Iterable[tuple[int, ChatRequest]]) -> Iterator[tuple[int, ChatReply]]:
        """Replies to numbered requests, the longest first. A reply is drawn by its request's number."""
        asked = {
            number: [Message(cast(Role, message["role"]), message["content"]) for message in request.messages]
            for number, request in requests
        }
        assistant = self._answerer.load()
        lengths = dict(zip(asked, map(len, assistant.tokens(list(asked.values()))), strict=True))
        for batch in self._answerer.answers(asked, asked, self._spec):
            for number, answer in batch:
                yield number, ChatReply(answer.generation, None, lengths[number], answer.generated_tokens, answer.finish, 1)
