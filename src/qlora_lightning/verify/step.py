"""One optimizer step without a Trainer, as the Trainer makes it: ``training_step`` on every microbatch, its result divided by
``accumulate_grad_batches``, backward, gradients added up.

Shapes: total values of the flat adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from qlora_lightning.data.collate import Batch
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import MemoryPolicy


class Step(NamedTuple):
    """What one optimizer step computes."""

    loss: float
    gradient: Tensor
    """[total] fp32, of the flat adapter."""


@dataclass
class Outside:
    """What a module asks its Trainer for, where there is none."""

    device: torch.device
    policy: MemoryPolicy
    datamodule: InstructionDataModule
    accumulate_grad_batches: int = 1
    world_size: int = 1
    state: Any = field(default_factory=lambda: SimpleNamespace(fn="fit"))

    @property
    def strategy(self) -> Any:
        """Where the model is, and what it may keep."""
        return SimpleNamespace(root_device=self.device, policy=self.policy)


def prepare(module: QLoRAModule, outside: Outside) -> None:
    """Load the module's model as a fit does, unless it is there already, and let ``outside`` take the Trainer's place."""
    module.trainer = outside  # type: ignore[assignment]
    module.configure_model()
    module.to(outside.device)  # nothing moves; the module learns where it is


def wake(module: QLoRAModule) -> None:
    """Give the adapter's B values that are not zero, the same wherever it is done: behind a B of zero no A has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def compute_step(module: QLoRAModule, outside: Outside, batches: Sequence[Batch], accumulate: int, seed: int = 0) -> Step:
    """Loss and gradient of one optimizer step on one rank, as its Trainer would make them.

    Args:
        module: with its model, ``outside`` in the Trainer's place.
        outside: is told ``accumulate``.
        batches: the rank's microbatches.
        accumulate: accumulate_grad_batches.
        seed: of dropout.
    """
    outside.accumulate_grad_batches = accumulate
    module.model.train()
    module.flat.zero_grad()
    torch.manual_seed(seed)
    loss = 0.0
    for number, batch in enumerate(batches):
        share = module.training_step(move_data_to_device(batch, outside.device), number) / accumulate
        share.backward()
        loss += float(share.detach())
    return Step(loss, module.flat.gradient.clone())
