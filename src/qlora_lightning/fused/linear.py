"""Linear layers that read the same input, as one product: frozen 4-bit weights stacked, LoRA beside them.

Shapes as in ``kernels/reference.py``: N tokens, I and O the group's in- and output features, R = n * r, P >= R.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qlora_lightning.kernels.dropout import Dropout
from qlora_lightning.kernels.quantized import QuantizedWeight

PAD = 64
"""Columns for LoRA behind an input come in multiples of this: a product's inner dimension stays a whole number of tiles."""
APART = 192
"""Ranks from which the gradient's product with scale * B is one by itself: behind W they would begin a tile of their own
(benchmarks/2026-11-23-kernels-h200.md)."""


@dataclass(frozen=True)
class Values:
    """A block of the flat adapter: fp32 values and the gradient that is added to."""

    data: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Fp8Scales:
    """Of a group's weights as products in e4m3 read them, all fp32: value = scale * e4m3's."""

    output_O: Tensor
    """Of each output feature, for the forward."""
    input_I: Tensor
    """Of each input feature, for the backward."""
    inverse_O: Tensor
    """1 / ``output_O``."""
    inverse_I: Tensor


@dataclass(frozen=True)
class LinearGroup:
    """n linear layers with the same input: q, k, v; o; gate, up; down."""

    weights: Sequence[QuantizedWeight]
    bias: Tensor | None
    """[O] in the compute dtype, or none."""
    a: Values
    """[R, I]."""
    b: Values
    """[O, r]."""
    scale: float
    """alpha / r."""
    dropout: float
    """Its probability; 0 is none."""
    stream: int
    """This group's number among the streams of the dropout's hash (two a group)."""
    fp8_scales: Fp8Scales | None = None
    """Given where products are computed in e4m3."""

    @property
    def sizes(self) -> list[int]:
        """Output features of each layer."""
        return [weight.shape[0] for weight in self.weights]

    @property
    def features(self) -> int:
        """I."""
        return self.weights[0].shape[1]

    @property
    def outputs(self) -> int:
        """O."""
        return sum(self.sizes)

    @property
    def rank(self) -> int:
        """r."""
        return self.b.data.shape[1]

    @property
    def ranks(self) -> int:
        """R."""
        return self.rank * len(self.weights)

    @property
    def width(self) -> int:
        """I + P: columns of the input with LoRA's behind it."""
        return width(self.features, self.ranks)

    def masks(self, seed: Tensor, first_token: int = 0) -> Dropout | None:
        """The dropout of this microbatch."""
        return Dropout(self.dropout, seed, self.stream, first_token) if self.dropout else None


class Linear:
    """A group at work in one pass over a block: its weights in the compute dtype for as long as the pass needs them.

    Args:
        group: whose.
        kernels: ``kernels.reference`` or ``kernels.triton_ops``.
        seed: the microbatch's, [1] int64.
        dtype: of the products.
        expanded: the weights in that dtype, where they were kept: ``expand`` made them.
    """

    def __init__(self, group: LinearGroup, kernels: ModuleType, seed: Tensor, dtype: torch.dtype, expanded: Tensor | None = None) -> None:
        self.group, self.kernels, self.seed, self.dtype = group, kernels, seed, dtype
        self.weight = expand(group, kernels, dtype, seed.device) if expanded is None else expanded
        kernels.place_lora_b(group.b.data, group.sizes, group.scale, self.weight[:, group.features :])
        self.a = group.a.data.to(dtype)

    def empty_cat(self, tokens: int) -> Tensor:
        """[tokens, I + P], to be filled by whoever makes the input."""
        return torch.empty(tokens, self.group.width, dtype=self.dtype, device=self.seed.device)

    def project(self, cat: Tensor, first_token: int = 0, source: Tensor | None = None) -> Tensor:
        """Fill the columns behind the input with LoRA's first product.

        Args:
            cat: [N, I + P] whose first I columns are the input, or become it where ``source`` is given.
            first_token: number of the first row's token in the microbatch.
            source: [N, I] to be copied.

        Returns:
            What the columns hold, [N, R], by itself.
        """
        group, features = self.group, self.group.features
        inputs, copy = (cat[:, :features], None) if source is None else (source, cat[:, :features])
        xa: Tensor = self.kernels.lora_project(inputs, self.a, group.rank, group.masks(self.seed, first_token), cat[:, features:], copy)
        return xa

    def forward(self, cat: Tensor, out_NO: Tensor | None = None) -> Tensor:
        """[N, O]: the layers' outputs side by side, LoRA's part with them; written to ``out_NO`` where it is given."""
        if self.group.bias is None:
            return torch.mm(cat, self.weight.t(), out=out_NO)
        return torch.addmm(self.group.bias, cat, self.weight.t(), out=out_NO)

    def backward(self, dy_NO: Tensor, xa_NR: Tensor, input_needed: bool = True) -> Tensor:
        """B's gradient, and [N, I + P] for ``lora_backward``: the input's gradient past LoRA and, behind it, that of ``xa_NR``.

        Where the input's is not needed, its columns are left unwritten.
        """
        group = self.group
        self.kernels.lora_grad_b(dy_NO, xa_NR, group.rank, group.sizes, group.scale, group.b.grad)
        if input_needed and group.ranks < APART:
            return torch.mm(dy_NO, self.weight)
        dcat = self.empty_cat(len(dy_NO))
        torch.mm(dy_NO, self.weight[:, group.features :], out=dcat[:, group.features :])
        if input_needed:
            torch.mm(dy_NO, self.weight[:, : group.features], out=dcat[:, : group.features])
        return dcat

    def through_lora(
        self, dcat: Tensor, x_NI: Tensor, first_token: int = 0, norm: tuple[Tensor, Tensor] | None = None, input_needed: bool = True
    ) -> Tensor:
        """Finish ``backward``'s result in place: A's gradient, and the gradient of the input [N, I] as a view."""
        masks = self.group.masks(self.seed, first_token)
        self.kernels.lora_backward(dcat, x_NI, self.a, self.group.rank, masks, self.group.a.grad, norm, input_needed)
        return dcat[:, : self.group.features]

    def through_swiglu(self, dcat: Tensor, gate_up_N2f: Tensor, first_token: int = 0) -> None:
        """As ``through_lora`` for down_proj, on to gate and up: ``gate_up_N2f`` becomes its gradient."""
        self.kernels.lora_backward_swiglu(dcat, gate_up_N2f, self.a, self.group.masks(self.seed, first_token), self.group.a.grad)


def width(features: int, ranks: int) -> int:
    """I + P: columns of the weights of linear layers with the same input, those of LoRA behind them and rounded up."""
    return features + -(-ranks // PAD) * PAD


def expand(group: LinearGroup, kernels: ModuleType, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[O, I + P]: the frozen weights in ``dtype``; the columns behind them are for scale * B, and still unwritten."""
    weight = torch.empty(group.outputs, group.width, dtype=dtype, device=device)
    kernels.dequantize(group.weights, weight[:, : group.features])
    return weight
