"""Load a base model in 4 bits through transformers, straight onto its device, everything else in the compute dtype.

Lightning's own bitsandbytes plugin is not used: it quantises lm_head and attached adapters too, casts through fp16, and reports
success when it ignored the weights of a 4-bit checkpoint.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import hub_errors, quiet_transformers, resolve_base

Compute = Literal["auto", "bf16", "fp32"]


@dataclass
class QuantizationSpec:
    """How the frozen base is stored."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of the linear layers' weights, in blocks of 64."""
    double_quant: bool = True
    """Store each block's absmax in 8 bits as well (double quantisation): 0.127 instead of 0.5 bit a parameter."""


def compute_dtype(compute: Compute, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products: bf16 where the device multiplies it well, else fp32.

    Raises:
        UserError: bf16 is asked of a GPU that has none.
    """
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            if compute == "fp32":
                return torch.float32
            raise UserError(
                f"{torch.cuda.get_device_name(device)} has no bf16 (Ampere or newer has); set model.compute: fp32, which is slow"
            )
        return torch.float32 if compute == "fp32" else torch.bfloat16
    if compute == "auto":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]


def load_base_model(
    source: str, quantization: QuantizationSpec, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """The base model on ``device``: linear layers of the blocks in 4 bits, all else in ``dtype``, everything frozen.

    Raises:
        UserError: no weights, no access, no memory, or bitsandbytes cannot work on this device.
    """
    check_bitsandbytes(device)
    resolved = resolve_base(source)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    with hub_errors(source), quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                resolved, revision=revision or "main", quantization_config=config, dtype=dtype, device_map={"": device}
            )
        except torch.OutOfMemoryError as error:
            total = torch.cuda.get_device_properties(device).total_memory / 2**30
            raise UserError(f"{source} in 4 bits does not fit on {device} ({total:.0f} GiB); choose a smaller base model") from error
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and resolved == source:
                raise  # a hub id: hub_errors knows better
            raise UserError(f"base model {source} cannot be loaded: {str(error).splitlines()[0][:200]}") from error
    _keep_plain_layout(model)
    model.requires_grad_(False)
    return model


def check_bitsandbytes(device: torch.device) -> None:
    """Quantise and multiply one small matrix, so that a broken installation is one line before anything is loaded."""
    try:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4", compress_statistics=True)
        ready = bool(torch.isfinite(bnb.dequantize_4bit(packed, state)).all())
    except Exception as error:
        raise UserError(
            f"bitsandbytes cannot work on {device} ({str(error).splitlines()[0][:160]}); see `qlora-lightning doctor`"
        ) from error
    if not ready:
        raise UserError(f"bitsandbytes gives wrong numbers on {device}; see `qlora-lightning doctor`")


def _keep_plain_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    The first forward in eval mode there converts weights in place to a layout for inference, with absmax in bf16 and no double
    quantisation; from then on a training step multiplies through an operator without a backward, and every gradient below it is wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (nn.Module types attributes as tensors)
