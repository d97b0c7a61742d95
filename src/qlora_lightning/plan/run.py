"""What a run will do, from its recipe and its data, before any weight is loaded."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.markup import escape
from rich.table import Table

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.modeling.loading import FP8_SAID, check_fp8, compute_dtype
from qlora_lightning.module import QLoRAModule
from qlora_lightning.optim import describe_optimizer
from qlora_lightning.strategies.policy import MemoryPolicy


def plan_run(trainer: Trainer, module: QLoRAModule, data: InstructionDataModule) -> dict[str, Any]:
    """The plan of a fit whose data is set up.

    Returns:
        Line name -> text or number, in the order in which to read them.
    """
    steps = data.total_steps
    device = trainer.strategy.root_device
    accumulate, ranks = trainer.accumulate_grad_batches, trainer.world_size
    optimizer, lora = module.optimizer, module.lora
    reason = why_not_fused(module, device)
    return {
        "run folder": str(trainer.default_root_dir),
        "base model": module.base_model,
        "stored as": f"{module.quantization.quant_type.upper()}{' + double quantisation' if module.quantization.double_quant else ''}",
        "adapter": f"LoRA r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout:g} on {', '.join(lora.target_modules)}",
        "device": f"{device}, computing {precision(module, device)}",
        "blocks": f"transformers' own ({reason})"
        if reason
        else "fused, if they know the model's family: the log says so when it is loaded",
        **_data_lines(data),
        "held out": f"{data.val_report.kept:,} examples" if data.val_report else "nothing: no validation rows are named",
        "template": data.spec.template,
        "batch": f"{data.global_batch_size} rows a step = {accumulate} x {data.global_batch_size // (accumulate * ranks)}"
        + (f" x {ranks} devices" if ranks > 1 else ""),
        "packing": f"on, rows of at most {data.pack_length:,} tokens" if data.pack_length else "off",
        "steps": f"{steps:,}" if data.streaming else f"{steps:,} = {steps / data.steps_per_epoch:.2f} epochs of {data.steps_per_epoch:,}",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule}"
        + (f" after {optimizer.warmup_steps} steps of warm-up" if optimizer.warmup_steps else ""),
        "optimizer": describe_optimizer(module.policy, device),
        "checkpointing": checkpointing(module.policy, fused=reason is None),
    }


def precision(module: QLoRAModule, device: torch.device) -> str:
    """What products are computed in.

    Raises:
        UserError: FP8 is wanted where it cannot be.
    """
    check_fp8(module.compute, module.fused, device)
    if module.compute == "fp8":
        return FP8_SAID
    return f"in {str(compute_dtype(module.compute, device)).removeprefix('torch.')}"


def why_not_fused(module: QLoRAModule, device: torch.device) -> str | None:
    """Why training cannot take the fused path; None where only the model's family, which is not known yet, still decides."""
    if not module.fused:
        return "model.fused is false"
    if device.type != "cuda":
        return "the fused path needs a GPU"
    dtype = compute_dtype(module.compute, device)
    return None if dtype == torch.bfloat16 else f"the fused path computes in bf16, not {str(dtype).removeprefix('torch.')}"


def checkpointing(policy: MemoryPolicy, fused: bool) -> str:
    """What is kept for backward. Only the fused path plans within a budget and lets inputs wait on the host."""
    if fused:
        return policy.describe_checkpointing()
    if policy.gradient_checkpointing == "auto":
        return "gradient checkpointing full, as auto means without fused blocks"
    return replace(policy, offload_inputs=False).describe_checkpointing()


def _data_lines(data: InstructionDataModule) -> dict[str, str]:
    report, names = data.train_report, " + ".join(f"{one.spec.name}{_times(one.weight)}" for one in data.sets)
    if report is None:
        return {"data": f"{names}, streamed"}
    supervised = report.supervised_tokens / report.tokens
    return {
        "data": f"{names}: {report.kept:,} examples, {report.tokens:,} tokens, {supervised:.0%} supervised",
        "left out": ", ".join(f"{count:,} rows: {reason}" for reason, count in report.skipped.items()) or "nothing",
        "cut to length": f"{report.truncated:,} examples" if report.truncated else "nothing",
        "lengths": f"{report.length_min} to {report.length_max}, median {report.length_median:g} tokens",
    }


def _times(weight: float) -> str:
    return "" if weight == 1 else f" x {weight:g}"


def plan_table(plan: dict[str, Any]) -> Table:
    """The plan for the terminal."""
    table = Table(title="Plan of the run", title_justify="left", show_header=False)
    for name, value in plan.items():
        table.add_row(name, escape(str(value)))
    return table
