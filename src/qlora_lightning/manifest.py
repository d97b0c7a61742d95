"""The manifest of a run: what a fit that goes on from a checkpoint must have in common with the one that wrote it.

It is one flat table of plain values, saved with each checkpoint. A name is that of an option where one option sets the value. What may
differ is left out: microbatches, ranks and how they work together, checkpointing policy, workers, logging, paths of the same content, and
the run's length where the schedule does not depend on it. Versions and the device are kept apart: where they differ the run goes on, with
a warning.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.fingerprint import base_fingerprint
from qlora_lightning.modeling.loading import compute_dtype
from qlora_lightning.modeling.sources import resolve_base
from qlora_lightning.modeling.tokenizer import tokenizer_digest
from qlora_lightning.strategies.policy import MemoryPolicy

if TYPE_CHECKING:
    from qlora_lightning.module import QLoRAModule

Plain = str | int | float | list[Any] | None
BASE, TEMPLATE, TOKENIZER = "base model", "text of the template", "tokenizer"
TRAINING, HELDOUT, EPOCH, LAST_STEP, STATE = "training rows", "held-out rows", "steps of an epoch", "last step", "optimizer state"
_WAYS_OUT = {
    BASE: "give the base model of the run, with the files that it had",
    TEMPLATE: "give the base model with the chat template that it had",
    TOKENIZER: "give the base model with the tokenizer files that it had",
    TRAINING: "give the files and the fields of data.dataset and data.mix that it had",
    HELDOUT: "give the files and the fields of data.dataset and data.mix that it had",
    EPOCH: "set trainer.limit_train_batches and data.mix as they were",
    LAST_STEP: "the schedule ends there, so set trainer.max_steps and trainer.max_epochs as they were",
    STATE: "set trainer.strategy.init_args.paged_optimizer and optimizer_bits as they were (a CPU keeps torch's; so does a GPU with "
    "paged_optimizer: false)",
}
_PACKAGES = ("torch", "lightning", "transformers", "bitsandbytes")


def model_manifest(module: "QLoRAModule") -> dict[str, Plain]:
    """What whoever loads a checkpoint's adapter must share with its run; the base where its files or a loaded model tell."""
    base: dict[str, Plain] = {}
    if hasattr(module, "base_fingerprint") or Path(resolve_base(module.base_model)).is_dir():
        base[BASE] = getattr(module, "base_fingerprint", None) or base_fingerprint(module.base_model, module.revision)
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    return base | {
        TOKENIZER: tokenizer_digest(data.tokenizer),
        "model.quantization.quant_type": module.quantization.quant_type,
        "model.quantization.double_quant": module.quantization.double_quant,
        "model.lora.r": module.lora.r,
        "model.lora.alpha": module.lora.alpha,
        "model.lora.target_modules": list(module.lora.target_modules),
    }


def fit_manifest(module: "QLoRAModule", trainer: Trainer) -> dict[str, Plain]:
    """All that a fit must share with the run that it continues: what is above, the arithmetic, the data and its order."""
    device = trainer.strategy.root_device
    dtype = "fp8" if module.compute == "fp8" else str(compute_dtype(module.compute, device)).removeprefix("torch.")
    optimizer = {f"model.optimizer.{name}": value for name, value in asdict(module.optimizer).items()}
    return {
        **model_manifest(module),
        "model.lora.dropout": module.lora.dropout,
        **optimizer,
        "model.optimizer.betas": list(module.optimizer.betas),
        "model.compute": {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype),
        "model.fused": module.fused,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        STATE: _state_kind(module.policy, device),
        **_data_manifest(trainer),
        LAST_STEP: trainer.datamodule.total_steps if module.optimizer.schedule != "constant" else None,  # type: ignore[attr-defined]
    }


def _data_manifest(trainer: Trainer) -> dict[str, Plain]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    recorded = data.metadata()
    rows, heldout = recorded["data"], data.val_set
    return {
        "data.seed": data.seed,
        "data.global_batch_size": data.global_batch_size,
        "data.group_by_length": data.group_by_length,
        "data.packing": data.packing,
        "data.pack_length": data.pack_length,
        "data.dataset.template": recorded["template"],
        TEMPLATE: recorded["template_hash"],
        "data.dataset.system_prompt": recorded["system_prompt"],
        TRAINING: f"{rows['training rows']} ({rows['fingerprint'][:16]})",
        HELDOUT: f"{rows['held-out rows']} ({heldout.fingerprint()[:16] if heldout is not None else 'none'})",
        EPOCH: None if data.streaming else data.steps_per_epoch,
    }


def _state_kind(policy: MemoryPolicy, device: torch.device) -> str:
    """Whose AdamW it is, as each stores its moments in its own way; see ``optim.build_optimizer``."""
    if device.type == "cpu" or not (policy.paged_optimizer or policy.optimizer_bits == 8):
        return "torch, 32-bit"
    return f"bitsandbytes, {policy.optimizer_bits}-bit"


def environment(device: torch.device) -> dict[str, str]:
    """What the bits of a sum may depend on besides: versions, the device, on a CPU its threads."""
    threads = f"{device.type.upper()} with {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return {package: version(package) for package in _PACKAGES} | {"device": name}


def saved_manifest(checkpoint: Mapping[str, Any]) -> dict[str, Plain]:
    """The manifest in a checkpoint.

    Raises:
        UserError: it has none.
    """
    try:
        manifest: dict[str, Plain] = checkpoint["qlora_lightning"]["manifest"]
    except KeyError:
        raise UserError(
            "this checkpoint was not written by this version of qlora-lightning; start from the adapter folder beside it"
        ) from None
    return manifest


def check_manifest(saved: Mapping[str, Plain], mine: Mapping[str, Plain], source: str) -> None:
    """Compare what ``mine`` names.

    Args:
        saved: The manifest in a checkpoint.
        mine: That of this run, or a part of it.
        source: What the line calls the checkpoint.

    Raises:
        UserError: the first thing that differs, with both values and the way out.
    """
    for name, value in mine.items():
        if (was := saved.get(name)) != value:
            way_out = _WAYS_OUT.get(name) or f"set --{name} {json.dumps(was)}"
            raise UserError(
                f"{name} was {_shown(was)} in the run of {source} and is {_shown(value)} now: a resumed run keeps it; {way_out}, "
                "or begin a new run from its adapter folder"
            )


def different_environment(saved: Mapping[str, str], mine: Mapping[str, str]) -> str | None:
    """One line on what differs, None where nothing does."""
    changes = [f"{name} {saved.get(name)} -> {value}" for name, value in mine.items() if saved.get(name) != value]
    if not changes:
        return None
    return f"warning: not the machine or versions that wrote the checkpoint ({', '.join(changes)}); the run goes on, its bits may differ"


def _shown(value: Plain) -> str:
    return "unset" if value is None else str(value)
