"""A frozen weight in 4 bits, as plain tensors that a kernel can be given."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Values that share one absmax."""
NESTED_BLOCK = 256
"""Blocks whose absmax share one scale, under double quantisation."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [O, I] as bitsandbytes stores it: two 4-bit codes a byte (the first in the high half), row after row.

    value = code[nibble] * absmax, where under double quantisation absmax = nested_code[absmax_u8] * nested_absmax + nested_offset, each
    operation rounded to fp32 by itself.
    """

    packed: Tensor
    """[O * I / 2] uint8."""
    code: Tensor
    """[16] fp32: the values of the 4-bit data type."""
    absmax: Tensor
    """[O * I / 64]: uint8 under double quantisation, else fp32."""
    shape: tuple[int, int]
    """(O, I)."""
    nested_code: Tensor | None = None
    """[256] fp32: the values of the 8-bit data type of absmax."""
    nested_absmax: Tensor | None = None
    """[O * I / 64 / 256] fp32."""
    nested_offset: Tensor | None = None
    """Scalar fp32."""

    @classmethod
    def of(cls, parameter: Any) -> "QuantizedWeight":
        """The weight of a ``bitsandbytes.nn.Linear4bit``, sharing its memory."""
        state = parameter.quant_state
        assert state.blocksize == BLOCK and parameter.data.dtype == torch.uint8
        rows, columns = state.shape
        flat = cls(parameter.data.view(-1), state.code, state.absmax, (int(rows), int(columns)))
        if not state.nested:
            return flat
        assert state.state2.blocksize == NESTED_BLOCK
        return cls(flat.packed, flat.code, flat.absmax, flat.shape, state.state2.code, state.state2.absmax, torch.as_tensor(state.offset))
