"""``predict``: the held-out prompts, answered, as JSON Lines in the run folder."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from qlora_lightning.answers import Answer
from qlora_lightning.callbacks.samples import asked
from qlora_lightning.console import say
from qlora_lightning.data.formats import Conversation
from qlora_lightning.generation import GenerationSpec
from qlora_lightning.module import QLoRAModule

PREDICTIONS_FILE = "predictions.jsonl"


class Predictions(BasePredictionWriter):
    """Write answers beside their references as batches end; the file appears when all are there.

    Args:
        max_new_tokens: Longest answer of predict, in tokens.
        temperature: 0 takes the likeliest token each time; the QLoRA paper samples at 0.7.
        top_p: Sample from the likeliest tokens that together have this probability (only where temperature is above 0).
        seed: Seed of the sampling.
    """

    def __init__(self, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 0.9, seed: int = 0) -> None:
        super().__init__("batch")
        self.spec = GenerationSpec(max_new_tokens, temperature, top_p, seed)
        self._conversations: list[Conversation] = []
        self._partial = Path()
        self._count = self._tokens = 0
        self._began = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an empty file beside the one to be."""
        assert isinstance(pl_module, QLoRAModule)
        pl_module.generation = self.spec
        self._conversations = trainer.datamodule.heldout_conversations()  # type: ignore[attr-defined]
        self._partial = Path(trainer.default_root_dir) / f"{PREDICTIONS_FILE}.partial"
        self._partial.write_bytes(b"")
        self._count, self._tokens, self._began = 0, 0, time.perf_counter()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[Answer],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the answers to the prompts ``batch_indices``."""
        assert batch_indices is not None
        with self._partial.open("a", encoding="utf-8") as file:
            for number, answer in zip(batch_indices, prediction, strict=True):
                conversation = self._conversations[number]
                row = {"prompt": asked(conversation), **asdict(answer), "reference": conversation[-1].content}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._count += len(prediction)
        self._tokens += sum(answer.generated_tokens for answer in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        target = self._partial.with_name(PREDICTIONS_FILE)
        self._partial.replace(target)
        seconds = time.perf_counter() - self._began
        say(f"{self._count} answers, {self._tokens:,} tokens in {seconds:.1f} s ({self._tokens / seconds:,.1f} tokens/s): {target}")
