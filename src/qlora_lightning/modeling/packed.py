"""Whether a model keeps the sequences of a packed row apart, found out by trying.

transformers derives the mask of a packed row from positions that begin anew, in the models and attention implementations that hand the
positions on; the others train on mixed sequences without a word. So the loaded model itself is asked.

Shapes: S sequences, n tokens of each, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlora_lightning.errors import UserError

_SEQUENCES, _TOKENS = 3, 13  # a length that divides no kernel's block
_LEAK = 0.01  # nothing of the first sequence may reach the others; equal to the last bit unless experts round by their other tokens
_ROUNDING = 0.25  # other shapes round otherwise: 0.06 in a 4-bit model of 135M parameters in bf16, 4e-6 in fp32


class Mixing(NamedTuple):
    """How far packing moves the logits of the sequences behind the first, in parts of what one row without borders does to them."""

    leak: float
    """When the first sequence is exchanged."""
    shift: float
    """Against rows of their own."""


def check_packing(model: nn.Module, name: str) -> None:
    """Try the model on a packed row, in the context (device, autocast) in which it trains; training mode and random state stay as they are.

    Raises:
        UserError: it mixes the sequences, or computes them otherwise than in rows of their own.
    """
    mixing = measure_mixing(model)
    if mixing.leak > _LEAK or mixing.shift > _ROUNDING:
        raise UserError(
            f"packing needs a model that keeps packed sequences apart, and {name} mixes them (a packed sequence's logits move by "
            f"{max(mixing):.0%} of what they do without any borders); set data.packing: false"
        )


@torch.no_grad()
def measure_mixing(model: nn.Module) -> Mixing:
    """Short random sequences, packed and in rows of their own."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, (_SEQUENCES + 1, _TOKENS), generator=generator, device="cpu")
    ids = ids.to(embedding.weight.device)
    ids_Sn, exchanged_Sn = ids[:-1], torch.cat([ids[-1:], ids[1:-1]])
    training = model.training
    model.eval()
    try:
        apart = _logits(model, ids_Sn)
        packed, exchanged = (_packed_logits(model, rows_Sn, borders=True) for rows_Sn in (ids_Sn, exchanged_Sn))
        mixed = _packed_logits(model, ids_Sn, borders=False)
    finally:
        model.train(training)
    scale = _distance(mixed, apart)
    return Mixing(leak=float(_distance(packed, exchanged) / scale), shift=float(_distance(packed, apart) / scale))


def _packed_logits(model: nn.Module, ids_Sn: Tensor, borders: bool) -> Tensor:
    """Logits [S, n, V] of all sequences in one row, with positions that begin anew at each border or run through."""
    positions = torch.arange(ids_Sn.numel(), device=ids_Sn.device)
    positions = positions % ids_Sn.shape[1] if borders else positions
    return _logits(model, ids_Sn.reshape(1, -1), positions[None]).unflatten(1, ids_Sn.shape).squeeze(0)


def _logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Between the logits of the sequences behind the first; a scalar."""
    return (one - other)[1:].norm()
