"""A model that learns nothing and remembers what it saw, and a quiet trainer for it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer


class Recorder(LightningModule):
    """Learns nothing; remembers the batches, and with which global step each came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[list[int]], int]] = []
        self.validated: list[int] = []
        self.prompts: list[list[int]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen.append((self.trainer.global_step, batch["input_ids"].tolist(), batch["tokens_in_step"]))
        return self.weight * batch["num_supervised"]

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.validated.append(batch["attention_mask"].sum(1).max().item())

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], _: int) -> None:
        self.prompts += batch["input_ids"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    base = {"accelerator": "cpu", "default_root_dir": tmp_path, "num_sanity_val_steps": 0, **quiet}
    return Trainer(**{**base, "max_epochs": 1, **options})
