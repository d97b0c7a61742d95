"""The model that a fit would train, without its weights: every layer with its shape and dtype, on torch's meta device.

transformers builds the modules from the base's config.json, its own quantiser replaces the linear layers, PEFT attaches the adapter: what
is counted on the result is what loading would make, to the byte (``modeling/ledger.py``).
"""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.adapters import ALL_LINEAR, LoRASpec, attach_lora, norms_to_fp32
from qlora_lightning.modeling.loading import QuantizationSpec, quantization_config
from qlora_lightning.modeling.sources import hub_errors, quiet_transformers, resolve_base


def base_config(source: str, revision: str | None = None) -> Any:
    """transformers' configuration of a base model named as in ``sources.resolve_base``; its weights need not be there.

    Raises:
        UserError: there is no such model, or no access.
    """
    resolved = resolve_base(source, weights=False)
    with hub_errors(source), quiet_transformers():
        return AutoConfig.from_pretrained(resolved, revision=revision or "main", trust_remote_code=False)


def skeleton(config: Any, source: str, lora: LoRASpec, quantization: QuantizationSpec | None, dtype: torch.dtype) -> PeftModel:
    """What ``QLoRAModule`` would build, without values. Draws no random number.

    Args:
        config: of ``base_config``.
        source: what a user calls the base model, for errors.
        lora: the adapter.
        quantization: how linear layers are stored; None leaves them in ``dtype``.
        dtype: of the products.

    Raises:
        UserError: the adapter does not fit the model, or transformers does not know it.
    """
    with torch.device("meta"), quiet_transformers():
        with hub_errors(source):
            base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            if quantization is not None:
                stored = quantization_config(quantization.storage, dtype)
                assert stored is not None
                quantizer = AutoHfQuantizer.from_config(stored)
                quantizer.preprocess_model(model=base, device_map=None, dtype=dtype)
                base.is_loaded_in_4bit = True  # by which PEFT chooses its layers
        base.requires_grad_(False)
        _check_lora(base, source, lora)
        model = attach_lora(base, lora)
        norms_to_fp32(model, dtype)
    return model.train()


def _check_lora(base: torch.nn.Module, source: str, lora: LoRASpec) -> None:
    """Refuse names that no layer has, which PEFT passes over where others match, and ranks that a matrix cannot have."""
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name}
    if lora.target_modules != [ALL_LINEAR]:
        for wanted in lora.target_modules:
            if not any(_matches(name, wanted) for name, _ in base.named_modules()):
                there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
                raise UserError(
                    f"model.lora.target_modules must name layers of {source}, got {wanted}; it has {there} ({ALL_LINEAR} is all of them)"
                )
        linear = {name: module for name, module in linear.items() if any(_matches(name, wanted) for wanted in lora.target_modules)}
    for name, module in linear.items():
        least = min(module.in_features, module.out_features)
        if lora.r > least:
            raise UserError(
                f"model.lora.r must not be above a layer's smaller side, got {lora.r} where {name} of {source} is "
                f"{module.out_features} x {module.in_features}; set model.lora.r to {least} or less"
            )


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
