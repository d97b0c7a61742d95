"""``strategy: qlora_ddp``: each rank trains its share of every step on its own device, with its own 4-bit base.

Nothing is wrapped in ``DistributedDataParallel``: its reducer waits for autograd to reach each parameter, and the fused path writes the
adapter's gradient itself. That gradient is one flat tensor, so an optimizer step needs one all-reduce, after its last microbatch. Ranks are
added up, not averaged: each microbatch's loss is divided by the supervised tokens of the whole step already.
"""

from collections.abc import Callable
from typing import TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from qlora_lightning.errors import ElsewhereError
from qlora_lightning.strategies.paged import PagedStrategy

T = TypeVar("T")


class QLoRADDPStrategy(PagedStrategy, DDPStrategy):
    """Train on several devices, each holding the whole base, under a memory policy that is every device's."""

    strategy_name = "qlora_ddp"

    def setup_environment(self) -> None:
        """Meet the other ranks; all begin with rank 0's seed, also where none was given: the adapter is drawn from it on each."""
        super().setup_environment()
        torch.manual_seed(self.broadcast(torch.initial_seed()))

    def setup(self, trainer: "pl.Trainer") -> None:
        """As for one device. Lightning's own would wrap the model, and before an evaluation send rank 0's whole base to the others."""
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        return model

    def sum_over_ranks(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    def of_every_rank(self, value: T) -> list[T]:
        return [self.broadcast(value, source) for source in range(self.world_size)]

    def on_first_rank(self, work: Callable[[], None]) -> None:
        error: Exception | None = None
        if self.is_global_zero:
            try:
                work()
            except Exception as raised:
                error = raised
        line = self.broadcast(str(error) if error is not None else None)
        if error is not None:
            raise error
        if line is not None:
            raise ElsewhereError(line)

    def teardown(self) -> None:
        """What a run has told the environment is of that run: another one may follow in this process."""
        super().teardown()
        assert self.cluster_environment is not None
        self.cluster_environment.teardown()
