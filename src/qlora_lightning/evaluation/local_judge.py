"""A judge that runs in this process: a base model, with an adapter or without."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qlora_lightning.data.rows import Message, Role
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.endpoint import ChatReply, ChatRequest
from qlora_lightning.evaluation.judging import Asking
from qlora_lightning.generation import Assistant, GenerationSpec, load_assistant


@dataclass
class LocalJudge:
    """Answers requests in batches."""

    assistant: Assistant
    spec: GenerationSpec
    """How replies are drawn, whatever a request says of it: one run asks all in the same way."""
    batch_size: int

    def replies(self, requests: Iterable[tuple[int, ChatRequest]]) -> Iterator[tuple[int, ChatReply]]:
        """Replies to numbered requests, the longest first."""
        asked = {
            number: [Message(cast(Role, message["role"]), message["content"]) for message in request.messages]
            for number, request in requests
        }
        lengths = dict(zip(asked, map(len, self.assistant.tokens(list(asked.values()))), strict=True))
        for batch in self.assistant.answer_all(asked, self.spec, self.batch_size):
            for number, answer in batch:
                yield number, ChatReply(answer.generation, None, lengths[number], answer.generated_tokens, answer.finish, 1)


def load_judge(adapter: str | None, base: str | None, template: str | None, asking: Asking, batch_size: int) -> LocalJudge:
    """Load a model as a judge.

    Raises:
        UserError: as of ``load_assistant``, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}; leave it out for 4")
    assistant, _ = load_assistant(Path(adapter) if adapter else None, base, template)
    return LocalJudge(assistant, GenerationSpec(asking.max_tokens, asking.temperature, top_p=1.0), batch_size)
