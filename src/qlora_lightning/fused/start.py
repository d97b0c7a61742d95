"""Whether a run takes the fused path, and its runner if it does."""

import importlib
import importlib.util
from dataclasses import replace
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from peft import PeftModel

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.fused.family import NotFused, fuse
from qlora_lightning.fused.fp8 import in_fp8
from qlora_lightning.fused.microbatch import LONGEST_STEP
from qlora_lightning.fused.runner import Runner
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.modeling.loading import FP8_SAID
from qlora_lightning.modeling.positions import positions_of
from qlora_lightning.strategies.policy import MemoryPolicy

LEAST_POSITIONS = 4096
"""Rows of RoPE's table at least: padding counts positions too, and some models do not say how many they have."""


def fused_runner(
    model: PeftModel,
    flat: FlatAdapter,
    policy: MemoryPolicy,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool = False,
    reproducible: bool = True,
) -> Runner | None:
    """The fused path of a run, or None where the device or the model needs transformers' own; both are said.

    Args:
        model: a 4-bit base with LoRA on ``device``.
        flat: its adapter.
        policy: of memory.
        device: where the run trains.
        dtype: of the products.
        fp8: compute those with frozen weights in e4m3.
        reproducible: two runs must be equal bit for bit.

    Raises:
        UserError: ``fp8`` is wanted of a model that the fused path does not know.
    """
    if device.type != "cuda":
        return None  # a CPU has no kernels to fuse for, and nobody expects it to
    if dtype != torch.bfloat16:
        say(f"Fused path: off, since it computes in bf16, not {str(dtype).removeprefix('torch.')}")
        return None
    base: Any = model.get_base_model()
    try:
        decoder = replace(fuse(model, flat, _triton_kernels(), dtype, rope_positions(base.config)), reproducible=reproducible)
        if fp8:
            decoder = in_fp8(decoder)
    except NotFused as reason:
        if fp8:
            raise UserError(f"model.compute: fp8 cannot train this model ({reason}); set model.compute: bf16") from reason
        say(f"Fused path: off ({reason}); training through transformers' blocks")
        return None
    say(f"Fused path: {decoder.name} blocks by hand, shapes that come again as CUDA graphs")
    if fp8:
        say(f"Compute: {FP8_SAID}")
    runner = Runner(decoder, flat, policy, state_bytes=2 * flat.parameter.numel() * policy.optimizer_bits // 8, graphs=True)
    known = ref(runner)  # the base may outlive its runner, with the memory of its graphs
    base.model.register_forward_pre_hook(lambda *_: give_way(known()))  # validation, samples and the like
    return runner


def rope_positions(config: Any) -> int:
    """Rows of RoPE's table for a model of this configuration; lengths are rounded up."""
    return max(positions_of(config) or 0, LEAST_POSITIONS) + LONGEST_STEP


def give_way(runner: Runner | None) -> None:
    """Free the memory of a runner's graphs where that is short; None is one that has gone."""
    if runner is not None:
        runner.give_up_graphs()


def _triton_kernels() -> ModuleType:
    """Triton comes with torch's builds for CUDA on Linux only."""
    if importlib.util.find_spec("triton") is None:
        raise NotFused("Triton is not installed")
    return importlib.import_module("qlora_lightning.kernels.triton_ops")
