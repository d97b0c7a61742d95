"""The adapter as one tensor: all trainable parameters are views of one fp32 buffer, their gradients views of another.

Hundreds of small tensors cost the host more than the work on them costs the device (at 7B, clipping 448 gradients takes 2.4 ms, one
flat gradient 0.13 ms). What is paid for it: gradients stay allocated between steps, 4 bytes a trained value. Their addresses never
change, which a captured CUDA graph needs.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ROW = 8192
"""Values of one row of the gradient's norm; the buffers are filled up to whole rows with zeros, which stay zero."""
PIECE = 2**26
"""Values of a piece that the optimizer updates at once, in whole quantisation blocks of an 8-bit state (256 values)."""


class FlatAdapter:
    """All trainable parameters of a model as views of one fp32 buffer, their gradients of another.

    The model's own parameters stay what they are to everyone else: names, shapes, ``state_dict``, loading in place, autograd, which adds
    to a gradient that is there. Only what replaces a parameter's tensor or drops its gradient parts them from the buffers: moving the
    model to another device, and ``zero_grad`` of a module or an optimizer; use the one here.

    In the buffer, parameters are in the order of their parent modules (``layers.3.self_attn``, say), within each first every lora_A, then
    every lora_B, in the order in which the model names them: the A of layers that read the same input lie next to each other.

    Args:
        model: its parameters that require a gradient are fp32, on one device, and not empty.
    """

    parameter: nn.Parameter
    """Every value [total] fp32; its ``grad`` is the flat gradient, always there."""
    gradient: Tensor
    """The same tensor as ``parameter.grad``."""
    count: int
    """Trained values: all but those that fill up the last row."""
    pieces: list[nn.Parameter]
    """``parameter`` cut into pieces of at most ``PIECE`` values, for the optimizer.

    bitsandbytes counts the values of a tensor in 32 bits without a check, and fetches the paged state of a whole tensor before it
    updates it: the state of a piece (0.5 GiB in 32 bits) fits where that of a 65B model's adapter would push out its own beginning.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = _in_order(model)
        device = parameters[0].device
        self.count = sum(parameter.numel() for parameter in parameters)
        values = torch.zeros(-(-self.count // ROW) * ROW, dtype=torch.float32, device=device)
        self._places: dict[nn.Parameter, slice] = {}
        start = 0
        for parameter in parameters:
            assert parameter.dtype == torch.float32
            place = slice(start, start + parameter.numel())
            values[place] = parameter.detach().flatten()
            parameter.data = values[place].view_as(parameter)
            self._places[parameter] = place
            start = place.stop
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the separate tensors' memory lies in segments that little else would fit
        self.gradient = torch.zeros_like(values)
        for parameter, place in self._places.items():
            parameter.grad = self.gradient[place].view_as(parameter)
        self.parameter = _with_gradient(values, self.gradient)
        self.pieces = [_with_gradient(*piece) for piece in zip(values.split(PIECE), self.gradient.split(PIECE), strict=True)]

    def stacked(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Parameters of equally many columns that lie next to each other, as one matrix.

        Returns:
            Values and gradient, both views [sum of rows, columns] fp32.
        """
        places = [self._places[parameter] for parameter in parameters]
        columns = parameters[0].shape[1]
        assert all(parameter.shape[1] == columns for parameter in parameters)
        assert all(left.stop == right.start for left, right in pairwise(places)), "not next to each other in the flat adapter"
        place = slice(places[0].start, places[-1].stop)
        return self.parameter.data[place].view(-1, columns), self.gradient[place].view(-1, columns)

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place, and show it to the optimizer again."""
        self.gradient.zero_()
        for piece, gradient in zip(self.pieces, self.gradient.split(PIECE), strict=True):
            piece.grad = gradient

    def withhold(self) -> None:
        """Hide the gradient from the optimizer until ``zero_grad``: it leaves what has none as it is, values, moments and step count."""
        for piece in self.pieces:
            piece.grad = None

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the gradient, a scalar.

        First of rows, then of their norms: torch sums a whole tensor on a CPU in a few fp32 accumulators, wrong in the fourth digit at
        5 million values.
        """
        rows: Tensor = torch.linalg.vector_norm(self.gradient.view(-1, ROW), dim=1)
        norm: Tensor = torch.linalg.vector_norm(rows)
        return norm


def _in_order(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters in the order of the buffer."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parents = list(dict.fromkeys(_parent(name) for name, _ in named))
    rank = {parent: number for number, parent in enumerate(parents)}
    return [parameter for name, parameter in sorted(named, key=lambda item: (rank[_parent(item[0])], ".lora_B." in item[0]))]


def _parent(name: str) -> str:
    """Of ``layers.3.self_attn.q_proj.lora_A.default.weight``, ``layers.3.self_attn``."""
    return name.partition(".lora_")[0].rpartition(".")[0]


def _with_gradient(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return parameter
