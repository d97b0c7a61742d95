"""A 4-bit base whose packed weights are divided over ranks, and gathered block by block while they are needed.

torch's ``fully_shard`` does the dividing, the gathering ahead of use and the freeing, of the packed codes alone, as the bytes that they
are: it gathers any dtype bit for bit, so the codes are stored as on one device, and bitsandbytes finds its constants on the layer. What a
step trains and what is small (adapter, norms, biases, embeddings, head, quantisation constants) is whole on every rank.

A forward of one rank needs every rank's shares, so all ranks must run equally many. Training steps do. In evaluation a rank may have more
rows than another, or longer answers: before each forward without gradients, ranks tell each other that one comes, and a rank that is
through joins the gathers of the others (``serve``) until none has any left.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.checksum import checksum_of_packed

GATHERED_BLOCKS = 3
"""Blocks that lie gathered on a device at once, at most: the one that computes, and the next one as it arrives and as it is laid out."""


class BytesPerRank(NamedTuple):
    """Of a base's packed weights, on one device."""

    share: int
    """Always."""
    gathered: int
    """While it computes, on top of that."""


def bytes_per_rank(packed: int, blocks: int, ranks: int) -> BytesPerRank:
    """What a rank holds of packed weights; everything else of a model it holds whole.

    Args:
        packed: bytes of them all.
        blocks: that they are divided among evenly.
        ranks: that share them.
    """
    return BytesPerRank(-(-packed // ranks), min(GATHERED_BLOCKS, blocks) * packed // blocks)


class Packed(NamedTuple):
    """A 4-bit weight as it was before it was cut."""

    num_bytes: int
    checksum: int


def share_of(codes: Tensor, rank: int, ranks: int) -> Tensor:
    """Rank ``rank``'s part of packed codes [n, 1], as ``fully_shard`` cuts them: equal parts, the last ones shorter or empty; a view."""
    size = -(-codes.shape[0] // ranks)
    return codes[rank * size : (rank + 1) * size]


class ShardedBase:
    """Hands the packed weights of a model over to ``fully_shard``, and checks that what it gathers is what was packed.

    Args:
        model: of ``sharded_loading.load_share``, with its adapter on it: PEFT asks a weight for ``compress_statistics``, which a DTensor,
            as weights are from here on, does not have. Blocks and their parent become FSDPModules of their own class.
        mesh: of all ranks, one dimension.

    Raises:
        UserError: this family cannot be sharded, or ranks hold different weights.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        self._device = next(model.parameters()).device
        self._step_begun = False
        blocks = _blocks(model)
        for block in blocks.values():
            _shard(block, mesh)
        root = model.get_submodule(_parent_of(blocks))
        # no weights of its own: the blocks' common parent tells them when a pass begins, without which none is gathered ahead of use
        fully_shard(root, mesh=mesh, ignored_params=set(root.parameters()))
        root.register_forward_pre_hook(self._before_forward)
        self._blocks: list[Any] = list(blocks.values())
        self._layers = {f"{block}.{name}": layer for block in blocks for name, layer in _layers(blocks[block]).items()}
        self._check_ranks_agree()

    @property
    def bytes_held(self) -> int:
        """Of packed weights that this rank keeps between passes."""
        return sum(layer.weight.to_local().nbytes for layer in self._layers.values())

    def check(self, when: str) -> None:
        """Gather every block once and compare each layer's weight with what was packed.

        Args:
            when: completes "changed ...", for the error.

        Raises:
            UserError: on every rank, if a weight differs on any.
        """
        found = []
        for block in self._blocks:
            block.unshard()
            found += [checksum_of_packed(layer.weight, layer.quant_state) for layer in _layers(block).values()]
            block.reshard()
        differs = self._tensor([int(one != layer.packed.checksum) for one, layer in zip(found, self._layers.values(), strict=True)])
        dist.all_reduce(differs, dist.ReduceOp.MAX, self._group)
        self._refuse(differs, f"changed {when}: the numbers that were gathered are not those that were packed")

    def serve(self) -> None:
        """Take part in the other ranks' gathers until every rank waits here. Every rank must come here equally often.

        Within an optimizer step there is nothing to do, as no rank evaluates then.
        """
        while not self._step_begun and int(self._tell(0)):
            for block in self._blocks:
                block.unshard()
                block.reshard()

    def step_ends(self) -> None:
        """From here on ranks may evaluate."""
        self._step_begun = False

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            self._tell(1)
        elif not self._step_begun:  # another rank may still be evaluating
            self.serve()
            self._step_begun = True

    def _tell(self, mine: int) -> Tensor:
        """How many ranks begin a forward, when this one says whether it does; a sum that nobody waits for unless he reads it."""
        flag = self._tensor([mine])
        dist.all_reduce(flag, group=self._group)
        return flag

    def _check_ranks_agree(self) -> None:
        mine = self._tensor([layer.packed.checksum for layer in self._layers.values()])
        first = mine.clone()
        dist.broadcast(first, group=self._group, group_src=0)
        differs = (mine != first).to(torch.int64)
        dist.all_reduce(differs, dist.ReduceOp.MAX, self._group)
        self._refuse(differs, "is not the same on every rank: the base's files differ; copy the base again, to every machine")

    def _refuse(self, differs: Tensor, why: str) -> None:
        bad = [name for name, one in zip(self._layers, differs.tolist(), strict=True) if one]
        if bad:
            others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise UserError(f"the 4-bit weight of {_plain(bad[0])}{others} {why}")

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by name: what transformers computes again in backward as a whole.

    Raises:
        UserError: a 4-bit layer lies outside of them.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, GradientCheckpointingLayer) and not inside and _layers(module):
            blocks[name] = module
        elif isinstance(module, Linear4bit) and not inside:
            raise UserError(f"strategy qlora_fsdp2 divides decoder blocks, and {_plain(name)} lies in none; train this base with qlora_ddp")
    return blocks


def _shard(block: nn.Module, mesh: DeviceMesh) -> None:
    """``fully_shard`` on weights without values, then this rank's shares in their places: nothing is ever whole again at rest."""
    layers = list(_layers(block).values())
    rest = {parameter for parameter in block.parameters() if not hasattr(parameter, "quant_state")}
    shares = [layer.weight.data for layer in layers]
    for layer in layers:
        empty = torch.empty(layer.packed.num_bytes, 1, dtype=torch.uint8, device="meta")
        layer.weight = nn.Parameter(empty, requires_grad=False)
    fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
    for layer, share in zip(layers, shares, strict=True):
        whole = layer.weight
        share = DTensor.from_local(share, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        layer.weight = nn.Parameter(share, requires_grad=False)


def _layers(module: nn.Module) -> dict[str, Any]:
    """The 4-bit layers in it by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear4bit)}


def _parent_of(blocks: Collection[str]) -> str:
    """The module that has the list in which the blocks stand.

    Raises:
        UserError: they stand in several.
    """
    parents = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in blocks})
    if len(parents) != 1:
        found = ", ".join(map(_plain, parents))
        raise UserError(f"strategy qlora_fsdp2 divides one list of decoder blocks, got those of {found}; train this base with qlora_ddp")
    return parents[0]


def _plain(name: str) -> str:
    """A layer's name in the base."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")
