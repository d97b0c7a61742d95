"""What the ranks of a run tell each other: at the end of each optimizer step their losses and a few numbers, now and then a checksum."""

from collections.abc import Mapping

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.strategies.paged import PagedStrategy


class StepEnd:
    """The sums of an optimizer step over all ranks. One all-reduce of the gradient, one gathering of numbers, one wait of the host.

    Args:
        strategy: Of the run.
        flat: The adapter; its gradient is added up in place.
        loss: This rank's share of the step's loss, a scalar.
        told: This rank's numbers, under the same names on every rank.
    """

    grad_norm: Tensor
    """Norm of the step's gradient, a scalar on the device."""
    numbers: tuple[float, float]
    """The step's loss and that norm. Every rank has the same, so whatever is decided by them is decided alike."""
    heard: list[dict[str, float]]
    """What each rank told, in order of ranks."""

    def __init__(self, strategy: Strategy, flat: FlatAdapter, loss: Tensor, told: Mapping[str, float]) -> None:
        assert isinstance(strategy, PagedStrategy)
        strategy.sum_over_ranks(flat.gradient)
        self.grad_norm = flat.gradient_norm()
        numbers = torch.tensor([*told.values()], dtype=torch.float64, device=flat.gradient.device)
        of_ranks = strategy.all_gather(torch.cat([loss.double().view(1), numbers])).view(-1, 1 + len(told))
        total = of_ranks[:, 0].sum()  # in the order of ranks, on every rank
        both = torch.stack([total, self.grad_norm.double()]).expand(len(of_ranks), 2)
        rows = torch.cat([both, of_ranks[:, 1:]], dim=1).tolist()  # once a step the host waits for the device: here
        self.numbers = rows[0][0], rows[0][1]
        self.heard = [dict(zip(told, row[2:], strict=True)) for row in rows]


def begin_alike(strategy: Strategy, flat: FlatAdapter, step: int) -> None:
    """As ``check_ranks_alike``, and a first sum over ranks, of zeros: NCCL makes buffers for it, which the plan of memory must see."""
    check_ranks_alike(strategy, flat, step)
    assert isinstance(strategy, PagedStrategy)
    strategy.sum_over_ranks(flat.gradient)


def check_ranks_alike(strategy: Strategy, flat: FlatAdapter, step: int) -> None:
    """Raises UserError: the adapter is not the same on all ranks, to the last bit. Nothing would make it so again.

    Args:
        strategy: Of the run.
        flat: The adapter.
        step: Optimizer steps taken.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return
    assert isinstance(strategy, PagedStrategy)
    first, *others = strategy.of_every_rank(flat.checksum())
    if different := [rank for rank, one in enumerate(others, start=1) if one != first]:
        raise UserError(
            f"the adapter of rank {different[0]} is not that of rank 0 at step {step}: its device, its versions or its files are not "
            "those of the others; run qlora-lightning doctor on its machine, then go on from the last checkpoint (--ckpt_path last)"
        )
