"""The Triton kernels under the names, with the arguments and results, of ``kernels/reference.py``."""

from qlora_lightning.kernels.cross_entropy import cross_entropy
from qlora_lightning.kernels.lora_backward import lora_backward, lora_backward_swiglu, lora_grad_b
from qlora_lightning.kernels.lora_project import lora_project
from qlora_lightning.kernels.nf4 import dequantize, place_lora_b
from qlora_lightning.kernels.norm import add_rms_norm, rms_norm_backward
from qlora_lightning.kernels.rope import rope, rope_backward
from qlora_lightning.kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "dequantize",
    "lora_backward",
    "lora_backward_swiglu",
    "lora_grad_b",
    "lora_project",
    "place_lora_b",
    "rms_norm_backward",
    "rope",
    "rope_backward",
    "swiglu",
]
