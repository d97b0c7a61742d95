"""Activations and frozen weights in e4m3, one scale a row: what ``kernels/fp8.py`` computes, in plain torch.

A number is stored as round(value / scale), where scale is the largest magnitude that shares it over 448, e4m3's own. Shapes: N tokens;
I, O a group's in- and output features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_lightning.kernels.quantized import QuantizedWeight
from qlora_lightning.kernels.reference import dequantize

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3's numbers."""
SMALLEST = 2.0**-100
"""A row's largest magnitude counts as at least this: a row of zeros has a scale too, whose inverse is a number."""


def scale_of(absmax: Tensor) -> Tensor:
    """The scale, fp32, of values whose largest magnitudes are ``absmax``."""
    # By a tensor: torch multiplies a GPU's tensor by the inverse of a plain number, which rounds twice.
    return absmax.float().clamp(min=SMALLEST) / torch.full_like(absmax, LARGEST, dtype=torch.float32)


def quantize_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in e4m3 by its own largest magnitude; rows may be further apart than I.

    Returns:
        [N, I] e4m3, and the scales [N] fp32: a row is about its e4m3 values times its scale.
    """
    scale_N = scale_of(x_NI.abs().amax(1))
    return (x_NI.float() * (1 / scale_N)[:, None]).to(E4M3), scale_N


def dequantize_fp8(weights: Sequence[QuantizedWeight], inverse_O: Tensor, out_OI: Tensor) -> None:
    """Write 4-bit weights below one another in e4m3, each row times its factor.

    Args:
        weights: of one or more linear layers with the same input.
        inverse_O: 1 / scale of each row, fp32.
        out_OI: e4m3; their rows in order, I apart.
    """
    out_OI.copy_((_values(weights) * inverse_O[:, None]).to(E4M3))


def dequantize_fp8_transposed(weights: Sequence[QuantizedWeight], inverse_I: Tensor, out_IO: Tensor) -> None:
    """Write the transpose of the weights below one another in e4m3, each input feature times its factor.

    Args:
        weights: as in ``dequantize_fp8``.
        inverse_I: 1 / scale of each input feature, fp32.
        out_IO: e4m3; contiguous.
    """
    out_IO.copy_((_values(weights) * inverse_I).to(E4M3).t())


def _values(weights: Sequence[QuantizedWeight]) -> Tensor:
    """[O, I] fp32."""
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    values_OI = torch.empty(rows, columns, device=weights[0].packed.device)
    dequantize(weights, values_OI)
    return values_OI
