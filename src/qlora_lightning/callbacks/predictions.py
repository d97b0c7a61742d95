"""``predict``: the held-out prompts, answered, as JSON Lines in the run folder."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from qlora_lightning.answer_file import Answer
from qlora_lightning.callbacks.samples import asked
from qlora_lightning.console import say
from qlora_lightning.data.formats import Conversation
from qlora_lightning.generation import GenerationSpec
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies import QLoRAFSDP2Strategy

PREDICTIONS_FILE = "predictions.jsonl"
LOOK_SECONDS = 0.2
"""Between two looks at whether another rank is done."""


class Predictions(BasePredictionWriter):
    """Write answers beside their references as batches end; the file appears when all are there, in the order of the held-out rows.

    Each rank keeps its answers in a file of its own, which gets another name when they are complete. The first rank waits for those names:
    answers may keep one rank an hour longer than another, and no collective operation should have to wait for that long.

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
        self._parts: list[Path] = []  # of each rank
        self._began = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an empty file of this rank beside the one to be."""
        assert isinstance(pl_module, QLoRAModule)
        pl_module.generation = self.spec
        self._conversations = trainer.datamodule.heldout_conversations()  # type: ignore[attr-defined]
        root = Path(trainer.default_root_dir)
        self._parts = [root / f"{PREDICTIONS_FILE}.part-{rank}" for rank in range(trainer.world_size)]
        own = self._parts[trainer.global_rank]
        own.unlink(missing_ok=True)
        _partial(own).write_bytes(b"")
        trainer.strategy.barrier("predictions")  # nobody takes a part of an earlier start for one of this
        self._began = time.perf_counter()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[Answer],
        batch_indices: Sequence[int] | None,  # of this rank's loader
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the answers of a batch, each with the number of its conversation."""
        with _partial(self._parts[trainer.global_rank]).open("a", encoding="utf-8") as file:
            for number, answer in zip(batch["numbers"], prediction, strict=True):
                conversation = self._conversations[number]
                row = {"prompt": asked(conversation), **asdict(answer), "reference": conversation[-1].content}
                file.write(json.dumps([number, row], ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once all ranks are done, the first one puts the answers together."""
        own = self._parts[trainer.global_rank]
        _partial(own).replace(own)
        if isinstance(trainer.strategy, QLoRAFSDP2Strategy):
            trainer.strategy.barrier("predictions")  # where a rank that is done helps the others, who need its share of the base
        if not trainer.is_global_zero:
            return
        while not all(part.is_file() for part in self._parts):
            time.sleep(LOOK_SECONDS)
        rows = sorted(((number, row) for part in self._parts for number, row in _numbered(part)), key=lambda pair: pair[0])
        assert len({number for number, _ in rows}) == len(rows)
        target = self._parts[0].with_name(PREDICTIONS_FILE)
        ordered = target.with_name(f"{PREDICTIONS_FILE}.ordered")
        ordered.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows), encoding="utf-8")
        ordered.replace(target)
        for part in self._parts:
            part.unlink()
        seconds, tokens = time.perf_counter() - self._began, sum(row["generated_tokens"] for _, row in rows)
        say(f"{len(rows)} answers, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.1f} tokens/s): {target}")


def _partial(part: Path) -> Path:
    """The name of a rank's file while it is written."""
    return part.with_name(part.name.replace(".part-", ".partial-"))


def _numbered(part: Path) -> list[tuple[int, dict[str, Any]]]:
    with part.open(encoding="utf-8") as file:
        return [(number, row) for number, row in map(json.loads, file)]
