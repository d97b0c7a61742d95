"""The same held-out prompts answered before and after training, side by side."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.markup import escape
from rich.table import Table

from qlora_lightning.console import console, say
from qlora_lightning.data.formats import Conversation
from qlora_lightning.errors import UserError
from qlora_lightning.generation import Assistant, GenerationSpec
from qlora_lightning.module import QLoRAModule


class Samples(Callback):
    """Answer held-out prompts before and after training and print them beside each other.

    Args:
        count: How many held-out conversations to answer; 0 for none.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, count: int = 0, max_new_tokens: int = 64) -> None:
        if count < 0 or max_new_tokens < 1:
            raise UserError(f"samples.count must be 0 or more and samples.max_new_tokens 1 or more, got {count} and {max_new_tokens}")
        self.count = count
        self.spec = GenerationSpec(max_new_tokens=max_new_tokens)
        self._before: list[str] = []
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take no more samples than there are held-out rows, and say so before the model loads where there are none."""
        if stage != "fit" or not self.count:
            return
        rows = len(trainer.datamodule.heldout_conversations(self.count))  # type: ignore[attr-defined]
        if rows == 0:
            raise UserError(f"samples.count {self.count} needs held-out rows, and the data set has none; set data.dataset.validation_size")
        self.count = rows

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]
        self._resumed = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers of the untrained model; a resumed run brings them along, as far as it was asked for them then."""
        if self.count and not self._resumed:
            say(f"Answering {self.count} held-out prompts before training")
            self._before = self._answers(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.count:
            return
        table = Table(title="Held-out prompts, answered greedily", title_justify="left", show_lines=True)
        for heading in ("prompt", "before training", "after training", "reference"):
            table.add_column(heading, overflow="fold", ratio=1)
        conversations = trainer.datamodule.heldout_conversations(self.count)  # type: ignore[attr-defined]
        answers = self._answers(trainer, pl_module)
        for number, (conversation, after) in enumerate(zip(conversations, answers, strict=True)):
            before = self._before[number] if number < len(self._before) else "(not asked)"
            table.add_row(*(escape(text) for text in (asked(conversation), before, after, conversation[-1].content)))
        console.print(table)

    def _answers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        assert isinstance(pl_module, QLoRAModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assistant = Assistant(pl_module.model, data.tokenizer, data.renderer, pl_module.dtype_of_compute)
        return assistant.answer(data.heldout_conversations(self.count), self.spec)


def asked(conversation: Conversation) -> str:
    """What the last answer answers, with its separate input."""
    question = conversation[-2]
    return f"{question.content}\n\n{question.context}" if question.context else question.content
