"""A base model with its adapter, or a merged one, loaded to be asked or measured."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.adapters import (
    ADAPTER_FILE,
    LoRASpec,
    adapter_config,
    adapter_metadata,
    attach_lora,
    load_adapter,
    norms_to_fp32,
)
from qlora_lightning.modeling.fingerprint import base_fingerprint
from qlora_lightning.modeling.loading import Compute, QuantizationSpec, Storage, compute_dtype, load_stored
from qlora_lightning.modeling.sources import first_line
from qlora_lightning.modeling.tokenizer import check_tokenizer, load_tokenizer

_REVISION = re.compile(r"\w[\w-]*(?:[./][\w-]+)*")


@dataclass
class TrainedModel:
    """A model in eval mode with its tokenizer."""

    model: Any
    """A causal language model of transformers, or PEFT's around one where there is an adapter."""
    tokenizer: PreTrainedTokenizerFast
    dtype: torch.dtype
    """The dtype that matrix products are computed in."""
    storage: Storage
    """How the base is held."""
    metadata: dict[str, Any]
    """The adapter's, {} without one: template, system_prompt, data and more, see ``adapters.adapter_metadata``."""
    name: str
    """What to call it in tables: the adapter folder, else the base."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def computing(self) -> torch.autocast:
        """The context in which the model computes: adapters in fp32 are used in ``dtype``."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def load_trained(adapter: Path | None, base_model: str | None, storage: Storage | None = None) -> TrainedModel:
    """Load a base with an adapter, as the adapter's metadata says, or a base (or merged model) alone.

    Args:
        adapter: A PEFT adapter folder; None for the base alone.
        base_model: The base; by default the one that the adapter names.
        storage: How to hold the base; by default as the adapter was trained, without one nf4-dq.

    Raises:
        UserError: no base is known, or the adapter belongs to another one.
    """
    base_model, metadata = find_base(adapter, base_model)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    compute, stored = _recorded(metadata, str(adapter))
    dtype = compute_dtype(compute, device)
    storage = storage or stored
    tokenizer = load_tokenizer(base_model, metadata.get("revision"))
    if adapter:
        check_tokenizer(tokenizer, metadata, adapter)
    say(f"Loading {base_model} as {storage} onto {device}")
    model: Any = load_stored(base_model, storage, dtype, device, metadata.get("revision"))
    if adapter:
        model = attach_lora(model, adapter_spec(adapter))
        norms_to_fp32(model, dtype)
        load_adapter(model, adapter, base_fingerprint(base_model, metadata.get("revision")))
    return TrainedModel(model.eval(), tokenizer, dtype, storage, metadata, str(adapter or base_model))


def find_base(adapter: Path | None, base_model: str | None) -> tuple[str, dict[str, Any]]:
    """The base model's name and the adapter's metadata ({} without one), of what ``load_trained`` would load.

    Raises:
        UserError: no base is known.
    """
    metadata = adapter_metadata(adapter) if adapter else {}
    base_model = base_model or metadata.get("base_model")
    if base_model is None:
        raise UserError("no base model is known: give an adapter folder that this tool wrote, or --base_model NAME")
    return base_model, metadata


def adapter_spec(adapter: Path) -> LoRASpec:
    """The LoRA settings that an adapter folder records in PEFT's own configuration.

    Raises:
        UserError: they are broken, or more than ``LoRASpec`` can say.
    """
    config = adapter_config(adapter)
    _check_rank(adapter, config.r)
    targets = sorted(config.target_modules or []) if not isinstance(config.target_modules, str) else [config.target_modules]
    return LoRASpec(r=config.r, alpha=config.lora_alpha, dropout=0.0, target_modules=targets)


def _recorded(metadata: dict[str, Any], adapter: str) -> tuple[Compute, Storage]:
    """How an adapter was trained; its metadata may come from anywhere."""
    compute, quantization = metadata.get("compute") or "auto", metadata.get("quantization") or {}
    kind, double = quantization.get("quant_type", "nf4"), quantization.get("double_quant", True)
    if compute not in get_args(Compute) or kind not in ("nf4", "fp4") or not isinstance(double, bool):
        raise UserError(
            f"{adapter} records compute {compute!r} and quantization {quantization!r}, which this tool does not know; give another adapter"
        )
    if not _REVISION.fullmatch(metadata.get("revision") or "main"):
        raise UserError(f"{adapter} records revision {metadata['revision']!r}, which is none of the hub's; give another adapter")
    return cast(Compute, compute), QuantizationSpec(kind, double).storage


def _check_rank(adapter: Path, rank: Any) -> None:
    """Before room is made for an adapter of that rank: the file must hold one."""
    try:
        with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
            ranks = {file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name}  # noqa: SIM118
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(f"{adapter / ADAPTER_FILE} cannot be read ({first_line(error)}); copy the adapter again or give another") from error
    if ranks != {rank}:
        raise UserError(f"{adapter} says rank {rank} in its configuration, but its weights have {sorted(ranks)}; copy the adapter again")
