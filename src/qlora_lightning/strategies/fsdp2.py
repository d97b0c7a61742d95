"""``strategy: qlora_fsdp2``: as ``qlora_ddp``, but the ranks divide the 4-bit base among them; for bases that one device does not hold.

The adapter is small beside the base, so it, its gradient and the optimizer's state stay whole on every rank, as under ``qlora_ddp``:
one all-reduce a step, and checkpoints that every strategy reads. Lightning's ModelParallelStrategy divides what is trained as well, and
saves it as DTensors; the fused gradient, the paged optimizer and the single-device checkpoint would all be lost by that. So this is the
DDP strategy with ``fully_shard`` on frozen weights alone (``modeling/sharding.py``).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from qlora_lightning.console import say
from qlora_lightning.modeling.ledger import GIB
from qlora_lightning.modeling.loading import QuantizationSpec
from qlora_lightning.modeling.sharded_loading import load_share
from qlora_lightning.modeling.sharding import ShardedBase
from qlora_lightning.strategies.ddp import QLoRADDPStrategy

T = TypeVar("T")


class QLoRAFSDP2Strategy(QLoRADDPStrategy):
    """Train on several devices that divide the base's 4-bit weights among them; options are those of ``qlora_ddp``.

    Whatever ranks do together they do at places where they all come by. There a rank waits for the others, and an evaluating one needs its
    share: so every such place serves first.
    """

    strategy_name = "qlora_fsdp2"
    sharded: ShardedBase | None = None
    """The base, once the model is built."""
    _checked = False

    def load_base(
        self, source: str, quantization: QuantizationSpec, dtype: torch.dtype, device: torch.device, revision: str | None = None
    ) -> PreTrainedModel:
        """In place of ``loading.load_base_model``: this rank's share."""
        return load_share(source, quantization, dtype, device, revision, self.global_rank, self.world_size)

    def share_out(self, model: nn.Module) -> None:
        """Make the model that has been built upon ``load_base`` usable: its packed weights are gathered when they are needed.

        Raises:
            UserError: as ``ShardedBase``; or what is gathered is not what was packed.
        """
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self.sharded = ShardedBase(model, mesh)
        self.sharded.check("while it was divided over ranks")
        held = self.sharded.bytes_held
        say(f"4-bit weights: divided over ranks, {held / GIB:.3f} GiB of them on this one, one of {self.world_size}")

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: LightningModule | nn.Module | None = None, **kwargs: Any
    ) -> Any:
        """After the first one, the base must still be what it was."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.sharded is not None
        self.sharded.step_ends()
        if not self._checked:
            self.sharded.check("in the first optimizer step")
            self._checked = True
        return output

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._serve()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: T, src: int = 0) -> T:
        self._serve()
        return super().broadcast(obj, src)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        self._serve()
        return super().all_gather(tensor, group, sync_grads)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        self._serve()
        return super().reduce(tensor, group, reduce_op)

    def _serve(self) -> None:
        if self.sharded is not None:
            self.sharded.serve()
