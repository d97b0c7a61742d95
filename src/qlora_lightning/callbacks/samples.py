"""The same held-out prompts answered before, during and after training: in a file, in a table of W&B, and side by side at the end."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.markup import escape
from rich.table import Table

from qlora_lightning.callbacks.monitor import between_steps
from qlora_lightning.callbacks.run_files import SAMPLE_COLUMNS, SAMPLES_FILE, drop_samples_after, read_samples, write_samples
from qlora_lightning.console import console, say
from qlora_lightning.data.excerpts import harmless
from qlora_lightning.data.formats import Conversation
from qlora_lightning.errors import UserError
from qlora_lightning.generation import Assistant, GenerationSpec
from qlora_lightning.loggers import RunWandbLogger
from qlora_lightning.module import QLoRAModule


class Samples(Callback):
    """Answer held-out prompts greedily while a model learns.

    Each time the answers go into ``samples.jsonl`` of the run folder and to W&B, as one table that grows; at the end those of the untrained
    and the trained model are printed beside each other.

    Args:
        count: How many held-out conversations to answer; 0 for none.
        max_new_tokens: Longest answer, in tokens.
        every_n_steps: Optimizer steps between answers, which stop training meanwhile; unset: before and after training only.
    """

    def __init__(self, count: int = 0, max_new_tokens: int = 64, every_n_steps: int | None = None) -> None:
        if count < 0 or max_new_tokens < 1:
            raise UserError(f"samples.count must be 0 or more and samples.max_new_tokens 1 or more, got {count} and {max_new_tokens}")
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"samples.every_n_steps must be 1 or more, got {every_n_steps}; leave it out to answer before and after training only"
            )
        if every_n_steps is not None and not count:
            raise UserError(f"samples.every_n_steps {every_n_steps} has nothing to answer; set samples.count to the number of prompts")
        self.count = count
        self.every_n_steps = every_n_steps
        self.spec = GenerationSpec(max_new_tokens=max_new_tokens)
        self._conversations: list[Conversation] = []
        self._before: list[str] = []
        self._latest: list[str] = []
        self._answered = -1  # the step that `_latest` is of
        self._step = 0
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take no more samples than there are held-out rows, and say so before the model loads where there are none."""
        if stage != "fit" or not self.count:
            return
        self._conversations = trainer.datamodule.heldout_conversations(self.count)  # type: ignore[attr-defined]
        if not self._conversations:
            raise UserError(f"samples.count {self.count} needs held-out rows, and the data set has none; set data.dataset.validation_size")

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]
        self._resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers of the untrained model; a resumed run brings them along, as far as it was asked for them then."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            drop_samples_after(Path(trainer.default_root_dir), self._step if self._resumed else -1)
        if self._conversations and not self._resumed:
            say(f"Answering {len(self._conversations)} held-out prompts before training")
            self._answer(trainer, pl_module)
            self._before = self._latest

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Answer where an optimizer step has just ended and it is the turn of one."""
        if self.every_n_steps and trainer.global_step != self._step and trainer.global_step % self.every_n_steps == 0:
            began = time.perf_counter()
            with between_steps(trainer):
                self._answer(trainer, pl_module)
            seconds = time.perf_counter() - began
            say(f"Answered {len(self._conversations)} held-out prompts after step {trainer.global_step} in {seconds:.1f} s")
        self._step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._conversations:
            return
        if self._answered != trainer.global_step:
            self._answer(trainer, pl_module)
        console.print(self._comparison())
        say(f"Samples: {Path(trainer.default_root_dir, SAMPLES_FILE)}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was killed between its last save and these answers has no step left, and Lightning no end of training for it."""
        written = read_samples(Path(trainer.default_root_dir))
        if all(row["step"] != trainer.global_step for row in written):
            self.on_train_end(trainer, pl_module)

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer all prompts, as many at once as validation has rows in a batch, and write down what the model says now."""
        assert isinstance(pl_module, QLoRAModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assistant = Assistant(pl_module.model, data.tokenizer, data.renderer, pl_module.dtype_of_compute)
        starts = range(0, len(self._conversations), data.eval_batch_size)
        batches = [self._conversations[start : start + data.eval_batch_size] for start in starts]
        self._latest = [answer for batch in batches for answer in assistant.answer(batch, self.spec)]
        self._answered = trainer.global_step
        if trainer.is_global_zero:
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        """Into the file, and the whole file as a table: W&B shows the last one that has been logged under a name."""
        root = Path(trainer.default_root_dir)
        values = [
            (self._answered, asked(conversation), answer, conversation[-1].content)
            for conversation, answer in zip(self._conversations, self._latest, strict=True)
        ]
        earlier = [row for row in read_samples(root) if row["step"] < self._answered]
        rows = [*earlier, *(dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in values)]
        write_samples(root, rows)
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.log_table("samples", list(SAMPLE_COLUMNS), [list(row.values()) for row in rows], step=self._answered)

    def _comparison(self) -> Table:
        table = Table(title="Held-out prompts, answered greedily", title_justify="left", show_lines=True)
        for heading in ("prompt", "before training", "after training", "reference"):
            table.add_column(heading, overflow="fold", ratio=1)
        for number, (conversation, after) in enumerate(zip(self._conversations, self._latest, strict=True)):
            before = self._before[number] if number < len(self._before) else "(not asked)"
            texts = (asked(conversation), before, after, conversation[-1].content)
            table.add_row(*(escape(harmless(text)) for text in texts))
        return table


def asked(conversation: Conversation) -> str:
    """What the last answer answers, with its separate input."""
    question = conversation[-2]
    return f"{question.content}\n\n{question.context}" if question.context else question.content
