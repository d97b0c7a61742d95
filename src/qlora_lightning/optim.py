"""AdamW, plain or paged, and its learning-rate schedule. The memory policy decides where the state lives, the recipe the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qlora_lightning.errors import UserError

if TYPE_CHECKING:  # the strategies import this module
    from qlora_lightning.strategies.policy import MemoryPolicy


@dataclass
class OptimizerSpec:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    """Peak learning rate (QLoRA paper: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter's weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to zero at the last step as a line or a half cosine."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly to its peak."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"model.optimizer.learning_rate must be above 0, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise UserError(f"model.optimizer.warmup_steps must be 0 or more, got {self.warmup_steps}")


def build_optimizer(parameters: Iterable[torch.nn.Parameter], spec: OptimizerSpec, policy: MemoryPolicy, device: torch.device) -> Optimizer:
    """AdamW over ``parameters`` as ``policy`` allows on ``device``; on a CPU always torch's, as bitsandbytes pages on CUDA only."""
    numbers: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
    if device.type == "cpu":
        return torch.optim.AdamW(parameters, **numbers)
    if not policy.paged_optimizer and policy.optimizer_bits == 32:
        return torch.optim.AdamW(parameters, fused=True, **numbers)
    import bitsandbytes as bnb

    if not policy.paged_optimizer:
        return bnb.optim.AdamW8bit(parameters, **numbers)
    kind = bnb.optim.PagedAdamW32bit if policy.optimizer_bits == 32 else bnb.optim.PagedAdamW8bit
    return kind(parameters, **numbers)


def describe_optimizer(policy: MemoryPolicy, device: torch.device) -> str:
    """One line on the optimizer that ``build_optimizer`` gives, with the reason where it is not what the policy asks for."""
    if device.type == "cpu" and (policy.paged_optimizer or policy.optimizer_bits == 8):
        return "AdamW, 32-bit, plain: paged and 8-bit optimizers need a CUDA device"
    return f"AdamW, {policy.optimizer_bits}-bit, {'paged' if policy.paged_optimizer else 'plain'}"


def build_schedule(optimizer: Optimizer, spec: OptimizerSpec, total_steps: int) -> LambdaLR:
    """Warm-up, then the named schedule down to zero at ``total_steps`` optimizer steps."""

    if spec.schedule != "constant" and total_steps < 1:
        raise UserError(
            f"model.optimizer.schedule {spec.schedule} needs to know the last step; set trainer.max_steps or trainer.max_epochs"
        )

    def factor(step: int) -> float:
        if step < spec.warmup_steps:
            return (step + 1) / spec.warmup_steps
        progress = min(1.0, (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
        return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[spec.schedule]

    return LambdaLR(optimizer, factor)


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load ``state`` (tensors in host memory) so that what was paged is paged again.

    ``torch.optim`` moves state beside its parameter by itself. bitsandbytes does so too, which makes paged state ordinary device
    memory and the run larger after a resume than before: so its buffers are asked for anew, from the optimizer's own allocator.

    Raises:
        UserError: the state is that of other parameters than this optimizer's.
    """
    saved, mine = (sum(len(group["params"]) for group in groups) for groups in (state["param_groups"], optimizer.param_groups))
    if saved != mine:
        raise UserError(
            f"the checkpoint holds the optimizer's state as {saved} tensors, not {mine}: another version of qlora-lightning wrote it; "
            "start from the adapter folder beside it (--ckpt_path FOLDER: its weights, a fresh optimizer)"
        )
    if not hasattr(optimizer, "get_state_buffer"):
        optimizer.load_state_dict(state)
        return
    bitsandbytes: Any = optimizer
    bitsandbytes.load_state_dict(state, move_to_device=False)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                continue
            if key in ("state1", "state2"):  # the two moments, the only ones that bitsandbytes pages
                values[key] = bitsandbytes.get_state_buffer(parameter, dtype=value.dtype)
                values[key].copy_(value)
            else:
                values[key] = value.to(parameter.device)


def refuse_step(loss: float, norm: float) -> None:
    """Raises UserError: a step whose loss or gradient is no finite number would make every weight one."""
    raise UserError(
        f"a step has loss {loss:.4g} and gradient norm {norm:.4g}, which no update can use; lower model.optimizer.learning_rate"
    )


def state_bytes(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of the optimizer's state, and how many of them lie in unified memory."""
    tensors = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors), sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))
