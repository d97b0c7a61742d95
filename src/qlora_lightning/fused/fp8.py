"""Products with the frozen weights in e4m3, LoRA beside them in bf16: faster, and not the paper's arithmetic.

Activations are rounded row by row (a token), weights by output feature in the forward and by input feature in the backward; every row has
the scale that takes its largest magnitude to e4m3's. Sums are fp32. Shapes as in ``kernels/reference.py``.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from qlora_lightning.fused.block import Block
from qlora_lightning.fused.decoder import Decoder
from qlora_lightning.fused.family import NotFused
from qlora_lightning.fused.linear import Fp8Scales, Linear, LinearGroup
from qlora_lightning.kernels import fp8_reference
from qlora_lightning.kernels.fp8_reference import E4M3, scale_of
from qlora_lightning.kernels.quantized import BLOCK, NESTED_BLOCK, QuantizedWeight

STEP = 16
"""Features of a product in e4m3 come in multiples of this: its rows lie at multiples of 16 bytes."""
FAST_ACCUMULATION = True
"""Hopper's tensor cores add e4m3's products with about 14 bits, and skip what would add partial sums in fp32 outside of them, which costs
time. Modelled on random rows, that is wrong by 0.2 % (4096 summed) to 0.5 % (22,016), beside 3.8 % from rounding the operands."""
_ROWS = 4 * NESTED_BLOCK
"""Rows of a weight whose values are held in fp32 at once while the scales are made."""


class Fp8Linear(Linear):
    """A group at work: its weights in e4m3, each layout made when a product first asks for it.

    Args:
        group: whose; with ``fp8_scales``.
        kernels: ``kernels.reference`` or ``kernels.triton_ops``.
        seed: the microbatch's, [1] int64.
        dtype: of activations and of LoRA's products.
    """

    def __init__(self, group: LinearGroup, kernels: ModuleType, seed: Tensor, dtype: torch.dtype) -> None:
        assert group.fp8_scales is not None
        self.group, self.kernels, self.seed, self.dtype = group, kernels, seed, dtype
        self.scales = group.fp8_scales
        self.fp8 = fp8_kernels(seed.device)
        self.a = group.a.data.to(dtype)

    @cached_property
    def by_output(self) -> Tensor:
        """[O, I] e4m3: the forward's weight."""
        weight = torch.empty(self.group.outputs, self.group.features, dtype=E4M3, device=self.seed.device)
        self.fp8.dequantize_fp8(self.group.weights, self.scales.inverse_O, weight)
        return weight

    @cached_property
    def by_input(self) -> Tensor:
        """[I, O] e4m3: the backward's."""
        weight = torch.empty(self.group.features, self.group.outputs, dtype=E4M3, device=self.seed.device)
        self.fp8.dequantize_fp8_transposed(self.group.weights, self.scales.inverse_I, weight)
        return weight

    @cached_property
    def lora_b(self) -> Tensor:
        """[O, P]: scale * B of the layers, block-diagonal."""
        group = self.group
        placed = torch.empty(group.outputs, group.width - group.features, dtype=self.dtype, device=self.seed.device)
        self.kernels.place_lora_b(group.b.data, group.sizes, group.scale, placed)
        return placed

    def forward(self, cat: Tensor, out_NO: Tensor | None = None) -> Tensor:
        """[N, O]: the layers' outputs side by side, LoRA's part with them; written to ``out_NO`` where it is given."""
        features = self.group.features
        x8, scale_N = self.fp8.quantize_rows(cat[:, :features])
        out = torch.empty(len(cat), self.group.outputs, dtype=self.dtype, device=cat.device) if out_NO is None else out_NO
        self._multiply(x8, scale_N, self.by_output, self.scales.output_O, self.group.bias, out)
        return out.addmm_(cat[:, features:], self.lora_b.t())

    def backward(self, dy_NO: Tensor, xa_NR: Tensor, input_needed: bool = True) -> Tensor:
        """B's gradient, and [N, I + P] for ``lora_backward``: the input's gradient past LoRA and, behind it, that of ``xa_NR``.

        Where the input's is not needed, its columns are left unwritten.
        """
        group, features = self.group, self.group.features
        self.kernels.lora_grad_b(dy_NO, xa_NR, group.rank, group.sizes, group.scale, group.b.grad)
        dcat = self.empty_cat(len(dy_NO))
        if input_needed:
            dy8, scale_N = self.fp8.quantize_rows(dy_NO)
            self._multiply(dy8, scale_N, self.by_input, self.scales.input_I, None, dcat[:, :features])
        torch.mm(dy_NO, self.lora_b, out=dcat[:, features:])
        return dcat

    def _multiply(self, left8: Tensor, scale_N: Tensor, right8: Tensor, scale_M: Tensor, bias: Tensor | None, out_NM: Tensor) -> None:
        """left right^T + bias, both operands in e4m3 times the scales of their rows; rows of ``out_NM`` may be further apart than M."""
        torch._scaled_mm(
            left8,
            right8.t(),
            scale_a=scale_N[:, None],
            scale_b=scale_M[None],
            bias=bias,
            out_dtype=self.dtype,
            use_fast_accum=FAST_ACCUMULATION,
            out=out_NM,
        )


def fp8_kernels(device: torch.device) -> ModuleType:
    """The module that rounds to e4m3 on ``device``."""
    if device.type != "cuda":
        return fp8_reference
    from qlora_lightning.kernels import fp8  # Triton is part of torch's builds for CUDA only

    return fp8


def in_fp8(decoder: Decoder) -> Decoder:
    """The decoder whose products with frozen weights are in e4m3. Their scales are made here, once.

    Raises:
        NotFused: a group's outputs are of a number that such products do not take.
    """
    return replace(decoder, linear=Fp8Linear, blocks=[_in_fp8(block, decoder.kernels) for block in decoder.blocks])


def _in_fp8(block: Block, kernels: ModuleType) -> Block:
    groups = {name: getattr(block, name) for name in ("qkv", "out", "gate_up", "down")}
    return replace(block, **{name: replace(group, fp8_scales=_scales(group, kernels)) for name, group in groups.items()})


def _scales(group: LinearGroup, kernels: ModuleType) -> Fp8Scales:
    """Of the exact largest magnitudes of a group's values, by row and by column."""
    if group.outputs % STEP:
        raise NotFused(f"linear layers with one input have {group.outputs} outputs, no multiple of {STEP}, which FP8 needs")
    by_row, by_column = [], []
    for weight in group.weights:
        for part in _parts(weight):
            values = torch.empty(part.shape, device=part.packed.device)
            kernels.dequantize([part], values)
            values.abs_()
            by_row.append(values.amax(1))
            by_column.append(values.amax(0))
    output_O, input_I = scale_of(torch.cat(by_row)), scale_of(torch.stack(by_column).amax(0))
    return Fp8Scales(output_O, input_I, 1 / output_O, 1 / input_I)


def _parts(weight: QuantizedWeight) -> Iterator[QuantizedWeight]:
    """A weight in pieces of some rows, none of which divides the blocks of double quantisation."""
    rows, columns = weight.shape
    for first in range(0, rows, _ROWS):
        last = min(first + _ROWS, rows)
        begin, end = first * columns, last * columns
        blocks = slice(begin // BLOCK, end // BLOCK)
        part = replace(weight, packed=weight.packed[begin // 2 : end // 2], absmax=weight.absmax[blocks], shape=(last - first, columns))
        if weight.nested_absmax is not None:
            outer = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
            part = replace(part, nested_absmax=weight.nested_absmax[outer])
        yield part
