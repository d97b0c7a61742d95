"""Device memory of a fit on a device that need not be here: what is held before a step, what a step takes on each rung, what fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from peft import PeftModel

from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import Budget, describe_rungs, kept_bytes, left_for_weights, planned_bytes
from qlora_lightning.fused.family import NotFused
from qlora_lightning.fused.foresight import FusedShape, fused_shape
from qlora_lightning.fused.memory import block_under, budget_within, fitting_rungs
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels.attention import Backend, fa4_installed
from qlora_lightning.modeling.flat import ROW
from qlora_lightning.modeling.ledger import ledger
from qlora_lightning.modeling.loading import compute_dtype
from qlora_lightning.modeling.sharding import bytes_per_rank
from qlora_lightning.modeling.skeleton import base_config, skeleton
from qlora_lightning.module import QLoRAModule
from qlora_lightning.plan.fleet import ALONE, Fleet
from qlora_lightning.plan.longest import Longest
from qlora_lightning.plan.target import Target
from qlora_lightning.plan.walk import Walked, walk
from qlora_lightning.strategies.policy import GradientCheckpointing, MemoryPolicy

MODES: tuple[GradientCheckpointing, ...] = get_args(GradientCheckpointing)
GATHERED = "blocks gathered from all ranks"
LINEAR, CONSTANTS, OTHERS = "linear layers, 4 bits", "quantisation constants", "embeddings, head, norms"
ADAPTER, GRADIENT = "adapter, fp32", "its gradient, fp32"
"""Parts that every plan has."""
STATE_BLOCK = 256
"""Values of an 8-bit optimizer's state that share a scale."""


@dataclass(frozen=True)
class Step:
    """A microbatch of the longest kind under one mode of checkpointing."""

    kept: int
    """Bytes that blocks keep between forward and backward."""
    working: int
    """Bytes beside them, at the fullest moment: logits, a block's own products, dequantised weights."""
    peak: int
    """Bytes of the device in all."""
    fits: bool
    blocks: str
    """How many blocks keep what."""
    rungs: Sequence[Rung] = ()
    """Of each block, on the fused path."""
    paged_out: bool = False
    """Whether the optimizer's state must wait in host memory."""
    weights: int = 0
    """Bytes of weights that stay in 16 bits, being left over."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a fit takes of one device."""

    target: Target
    parts: dict[str, int]
    """Part -> bytes, before a step; the last is what others hold."""
    allocated: int
    """Bytes of the parts that torch's allocator gives out."""
    state: int
    """Bytes of the optimizer's state."""
    budget: Budget
    mode: GradientCheckpointing
    """The recipe's."""
    steps: dict[GradientCheckpointing, Step]
    """By mode; ``auto`` is missing where nothing fits."""
    not_fused: str | None
    """Why it does not take the fused path."""
    trained: int
    """Values of the adapter."""
    linear: int
    """Parameters of the linear layers in 4 bits."""

    @property
    def step(self) -> Step:
        """The recipe's; where ``auto`` finds no room, the least that it could take."""
        return self.steps.get(self.mode) or self.steps["full"]

    @property
    def fits(self) -> bool:
        """Whether the recipe can be trained there."""
        return self.step.fits


class Forecast:
    """The memory of a fit, from the base's config.json and its data's lengths.

    Args:
        module: says base, adapter, storage and dtype.
        config: transformers' of the base, where it is known already.
        fleet: the devices among which the base may be divided.

    Raises:
        UserError: the recipe does not fit the model.
    """

    def __init__(self, module: QLoRAModule, config: Any = None, fleet: Fleet = ALONE) -> None:
        self._module = module
        self.fleet = fleet
        self.config = base_config(module.base_model, module.revision) if config is None else config
        self._models: dict[torch.dtype, PeftModel] = {}
        self._walks: dict[Any, Walked] = {}

    def dtype(self, cuda: bool) -> torch.dtype:
        """Of the products on a GPU or on this CPU."""
        if cuda:
            return torch.float32 if self._module.compute == "fp32" else torch.bfloat16
        return compute_dtype(self._module.compute, torch.device("cpu"))

    def model(self, cuda: bool) -> PeftModel:
        """The model without values."""
        dtype, module = self.dtype(cuda), self._module
        if dtype not in self._models:
            self._models[dtype] = skeleton(self.config, module.base_model, module.lora, module.quantization, dtype)
        return self._models[dtype]

    def fused(self, cuda: bool) -> FusedShape | str:
        """The fused path's sizes, or why it is not taken."""
        if not self._module.fused:
            return "model.fused is false"
        if not cuda:
            return "the fused path needs a GPU"
        if self.fleet.sharded:
            return "qlora_fsdp2 divides the base"
        if self.dtype(cuda) != torch.bfloat16:
            return f"the fused path computes in bf16, not {str(self.dtype(cuda)).removeprefix('torch.')}"
        try:
            fused = fused_shape(self.model(cuda))
            return fused._replace(expanded=0) if self._module.compute == "fp8" else fused
        except NotFused as reason:
            return str(reason)

    def on(self, target: Target, policy: MemoryPolicy, longest: Longest | None) -> MemoryPlan:
        """What the fit takes there, by mode; None: only what it takes before a step."""
        fused, model = self.fused(target.cuda), self.model(target.cuda)
        held = _Held.of(model, policy, target)
        parts = dict(held.parts)
        if self.fleet.sharded:
            parts[LINEAR], parts[GATHERED] = bytes_per_rank(held.parts[LINEAR], self._blocks, self.fleet.ranks)
        if isinstance(fused, FusedShape):
            parts["RoPE's table"] = fused.tables
        allocated = sum(parts.values()) - (held.state if held.paged else 0)
        budget = budget_within(policy, target.total, target.elsewhere, sum(parts.values()))
        parts["CUDA's context, other processes" if target.cuda else "Python and its libraries"] = budget.held - sum(parts.values())
        movable = held.state if held.paged else 0
        steps: dict[GradientCheckpointing, Step] = {}
        if longest is not None and isinstance(fused, FusedShape):
            block = replace(fused.block, input_on_host=policy.offload_inputs)
            steps = _fused_steps(fused._replace(block=block), longest, budget, movable, target)
        elif longest is not None:
            steps = self._walked_steps(longest, budget, movable, target.cuda)
        reason = fused if isinstance(fused, str) else None
        return MemoryPlan(
            target, parts, allocated, held.state, budget, policy.gradient_checkpointing, steps, reason, held.trained, held.linear
        )

    @property
    def _blocks(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def _walked_steps(self, longest: Longest, budget: Budget, movable: int, cuda: bool) -> dict[GradientCheckpointing, Step]:
        full, none = (self._walk(longest, mode, cuda) for mode in ("full", "none"))
        again = _walked_step(full, budget, movable, "all are computed again")
        return {"none": _walked_step(none, budget, movable, "all keep everything"), "auto": again, "full": again}

    def _walk(self, longest: Longest, mode: GradientCheckpointing, cuda: bool) -> Walked:
        key = longest, mode, cuda
        if key not in self._walks:
            module = self._module
            self._walks[key] = walk(self.config, module.base_model, module.lora, self.dtype(cuda), longest, mode)
        return self._walks[key]


@dataclass(frozen=True)
class _Held:
    parts: dict[str, int]
    state: int
    paged: bool
    trained: int
    linear: int

    @classmethod
    def of(cls, model: PeftModel, policy: MemoryPolicy, target: Target) -> "_Held":
        rows = ledger(model)
        frozen = [row for row in rows if not row.trainable]
        linear = [row for row in frozen if row.part == "linear layers"]
        constants = sum(row.num_bytes for row in frozen if row.part == "quantisation constants")
        rest = sum(row.num_bytes for row in frozen) - sum(row.num_bytes for row in linear) - constants
        trained = sum(row.parameters for row in rows if row.trainable)
        values = -(-trained // ROW) * ROW
        bits, paged = (policy.optimizer_bits, policy.paged_optimizer) if target.cuda else (32, False)
        state = optimizer_bytes(values, bits)
        return cls(
            {
                LINEAR: sum(row.num_bytes for row in linear),
                CONSTANTS: constants,
                OTHERS: rest,
                ADAPTER: values * 4,
                GRADIENT: values * 4,
                f"optimizer's state, {bits} bits{', paged' if paged else ''}": state,
            },
            state,
            paged,
            trained,
            sum(row.parameters for row in linear),
        )


def optimizer_bytes(values: int, bits: int) -> int:
    """AdamW's two moments; in 8 bits with a fp32 scale a block."""
    return 2 * values * 4 if bits == 32 else 2 * (values + values // STATE_BLOCK * 4)


def _backend(longest: Longest) -> Backend:
    """What attention would take on a GPU: FlashAttention 4 needs one of its own kind, which is assumed where the package is there."""
    return "fa4" if fa4_installed() else "varlen" if longest.shape.sequences else "flash"


def _fused_steps(fused: FusedShape, longest: Longest, budget: Budget, movable: int, target: Target) -> dict[GradientCheckpointing, Step]:
    shape = longest.shape
    block = block_under(fused.block, shape, _backend(longest), target.processors)

    def step(rungs: Sequence[Rung], within: Budget) -> Step:
        kept, all_bytes = kept_bytes(block, shape.tokens, rungs), planned_bytes(block, shape.tokens, rungs, fused.vocabulary)
        fits, paged_out = _fits(all_bytes, within, movable)
        paged_out = paged_out or within.held < budget.held
        peak = budget.held - (movable if paged_out else 0) + all_bytes
        return Step(kept, all_bytes - kept, peak, fits, describe_rungs(rungs), rungs, paged_out)

    steps = {"none": step([Rung.ALL] * fused.layers, budget)}
    try:
        rungs, within = fitting_rungs(block, fused.layers, shape, fused.vocabulary, budget, movable)
        auto = step(rungs, within)
        weights = _left_weights(fused, within, auto) if set(rungs) == {Rung.ALL} else 0
        steps["auto"] = replace(auto, weights=weights, peak=auto.peak + weights)
    except UserError:
        pass  # not even the last rung has room: that one is shown
    steps["full"] = step([Rung.INPUT] * fused.layers, budget)
    return steps  # type: ignore[return-value]


def _left_weights(fused: FusedShape, budget: Budget, step: Step) -> int:
    """Bytes of the weights that the runner will keep in 16 bits."""
    left = left_for_weights(budget, step.kept + step.working)
    return fused.expanded * min(fused.layers, left // fused.expanded) if fused.expanded else 0


def _walked_step(walked: Walked, budget: Budget, movable: int, blocks: str) -> Step:
    fits, paged_out = _fits(walked.peak, budget, movable)
    peak = budget.held - (movable if paged_out else 0) + walked.peak
    return Step(walked.kept, walked.peak - walked.kept, peak, fits, blocks, paged_out=paged_out)


def _fits(needed: int, budget: Budget, movable: int) -> tuple[bool, bool]:
    """Whether so many bytes fit, and whether paged state must leave for it."""
    if needed <= budget.free:
        return True, False
    return needed <= budget.free + movable, movable > 0
