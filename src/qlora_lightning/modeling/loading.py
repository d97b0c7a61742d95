"""Load a base model in 4 bits through transformers, straight onto its device, everything else in the compute dtype.

Lightning's own bitsandbytes plugin is not used: it quantises lm_head and attached adapters too, casts through fp16, and reports
success when it ignored the weights of a 4-bit checkpoint.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.foreign import check_base_files
from qlora_lightning.modeling.sources import first_line, hub_errors, quiet_transformers, resolve_base

Compute = Literal["auto", "bf16", "fp32", "fp8"]
FP8_SAID = "products with frozen weights in FP8 (e4m3, a scale a row), bf16 elsewhere; not paper-exact"
"""What a run in FP8 says of itself."""
Storage = Literal["nf4-dq", "nf4", "fp4-dq", "fp4", "int8", "16bit"]
"""How a base is held in memory to be measured or asked: 4 bits with or without double quantisation, LLM.int8(), or not quantised."""


@dataclass
class QuantizationSpec:
    """How the frozen base is stored."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of the linear layers' weights, in blocks of 64."""
    double_quant: bool = True
    """Store each block's absmax in 8 bits as well (double quantisation): 0.127 instead of 0.5 bit a parameter."""

    @property
    def storage(self) -> Storage:
        """The same as one word."""
        match self.quant_type, self.double_quant:
            case "nf4", True:
                return "nf4-dq"
            case "nf4", False:
                return "nf4"
            case "fp4", True:
                return "fp4-dq"
        return "fp4"


def compute_dtype(compute: Compute, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products: bf16 where the device multiplies it well, else fp32.

    fp8 concerns training's products with frozen weights alone: everything else, and every other use of the model, is as with auto.

    Raises:
        UserError: bf16 is asked of a GPU that has none.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            if compute == "fp32":
                return torch.float32
            raise UserError(
                f"{torch.cuda.get_device_name(device)} has no bf16 (Ampere or newer has); set model.compute: fp32, which is slow"
            )
        return torch.float32 if compute == "fp32" else torch.bfloat16
    if compute in ("auto", "fp8"):
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]


def check_fp8(compute: Compute, fused: bool, device: torch.device) -> None:
    """Refuse to train in FP8 where that cannot be.

    Raises:
        UserError: the device has no tensor cores for it, or the fused path, which alone computes in it, is off.
    """
    if compute != "fp8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device}"
        raise UserError(f"model.compute: fp8 needs a GPU of compute capability 8.9 or more, which {name} is not; set model.compute: bf16")
    if not fused:
        raise UserError("model.compute: fp8 needs the fused path, which model.fused: false turns off; set model.compute: bf16")


def load_base_model(
    source: str, quantization: QuantizationSpec, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """The base model on ``device``: linear layers of the blocks in 4 bits, all else in ``dtype``, everything frozen.

    Raises:
        UserError: no weights, no access, no memory, or bitsandbytes cannot work on this device.
    """
    return load_stored(source, quantization.storage, dtype, device, revision)


def load_stored(source: str, storage: Storage, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> PreTrainedModel:
    """The base model on ``device``: linear layers of the blocks as ``storage`` says, all else in ``dtype``, everything frozen.

    Args:
        source: Named as in ``sources.resolve_base``.
        storage: 16bit leaves the weights in ``dtype``, which may be fp32.
        dtype: Dtype of what is not quantised, and of the products.
        device: Where the model is to live.
        revision: Commit, tag or branch of a hub id.

    Raises:
        UserError: as ``load_base_model``.
    """
    if storage != "16bit" and (reason := check_bitsandbytes(device, dtype)):
        raise UserError(f"bitsandbytes cannot work on {device} ({reason}); see `qlora-lightning doctor`")
    resolved = resolve_base(source)
    with hub_errors(source), quiet_transformers():
        check_base_files(resolved, revision, source)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                resolved,
                revision=revision or "main",
                quantization_config=quantization_config(storage, dtype),
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
            )
        except torch.OutOfMemoryError as error:
            total = torch.cuda.get_device_properties(device).total_memory / 2**30
            raise UserError(f"{source} as {storage} does not fit on {device} ({total:.0f} GiB); choose a smaller base model") from error
    _keep_plain_layout(model)
    model.requires_grad_(False)
    return model


def quantization_config(storage: Storage, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers is told about ``storage``; None for weights that are not quantised."""
    if storage == "16bit":
        return None
    if storage == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage.removesuffix("-dq"),
        bnb_4bit_use_double_quant=storage.endswith("-dq"),
        bnb_4bit_compute_dtype=dtype,
    )


def check_bitsandbytes(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Quantise 64 x 64 numbers to NF4 on ``device`` and multiply with them: the backend works when that equals its own definition.

    Args:
        device: Where the model is to live.
        dtype: The dtype of the matrix products.

    Returns:
        Why bitsandbytes cannot work there, in one line; None where it works.
    """
    try:
        error = _nf4_error(device, dtype)
    except Exception as failure:  # a missing library, a wrong CUDA build, no kernel for the device: all mean that it does not work
        return first_line(failure)
    return None if error < 0.02 else f"the 4-bit product is off by {error:.1%}"  # bfloat16 has 8 bits: two products differ by about 1 %


def _nf4_error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference between bitsandbytes' 4-bit product and the product of the dequantised weight, over the largest entry."""
    import bitsandbytes
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)
    # On the CPU whatever the default device is: Lightning makes it the GPU while a model is configured.
    weight, inputs = (torch.randn(64, 64, generator=generator, device="cpu").to(device, dtype) for _ in range(2))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = inputs.float() @ functional.dequantize_4bit(packed, state).float().t()
    product = bitsandbytes.matmul_4bit(inputs, packed.t(), quant_state=state)
    return float((product.float() - expected).abs().max() / expected.abs().max())


def _keep_plain_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    The first forward in eval mode there converts weights in place to a layout for inference, with absmax in bf16 and no double
    quantisation; from then on a training step multiplies through an operator without a backward, and every gradient below it is wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (nn.Module types attributes as tensors)
