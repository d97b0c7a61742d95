"""LoRA's dropout without stored masks: every bit is a hash of a seed and of where it is used.

The functions here are the definition, in plain torch; a kernel computes the same bits where it needs them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """LoRA's dropout on the inputs of the layers that read one tensor: a mask of its own for each, never stored.

    Entry (token, column) of layer j is kept where 16 bits of a hash of (seed, stream, j, token, column) are at least 65,536 * p.
    """

    p: float
    """Probability that an entry becomes zero; the others are divided by 1 - p."""
    seed: Tensor
    """[1] int64 on the device: drawn anew for each microbatch."""
    stream: int
    """Tells this group of layers from the model's others: two numbers a group, this one and the next."""
    first_token: int = 0
    """Number of the first row's token in the microbatch, where a part of its tokens is passed: masks do not depend on the parts."""

    @property
    def threshold(self) -> int:
        """Of 16 random bits, from which value on an entry is kept."""
        return round(self.p * 65536)

    @property
    def rescale(self) -> float:
        """1 / (the probability that an entry is kept)."""
        return 65536 / (65536 - self.threshold)


def dropout_key(seed: Tensor, stream: int) -> Tensor:
    """[1] int64 below 2^32: what entry numbers are combined with, of a seed and a number of stream."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    return _mix(low ^ _mix((high + stream * 0x9E3779B9) & _WORD))


def keep_mask(dropout: Dropout, layer: int, tokens: int, columns: int) -> Tensor:
    """[tokens, columns] bool: what the mask of the group's layer number ``layer`` keeps.

    Layers 0 and 1 take the low and the high half of stream's words, 2 and 3 those of the next stream.
    """
    entries = (dropout.first_token * columns + torch.arange(tokens * columns, device=dropout.seed.device)) & _WORD
    words = _mix(entries ^ dropout_key(dropout.seed, dropout.stream + layer // 2))
    bits = (words >> (16 * (layer % 2))) & 0xFFFF
    return (bits >= dropout.threshold).view(tokens, columns)


def _mix(word: Tensor) -> Tensor:
    """A 32-bit finaliser: every bit of the result depends on every bit of ``word`` (int64 holding 32 bits)."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def dropped(x_NI: Tensor, dropout: Dropout | None, layer: int) -> Tensor:
    """The input of the group's layer number ``layer`` after its dropout."""
    if dropout is None:
        return x_NI
    return torch.where(keep_mask(dropout, layer, *x_NI.shape), x_NI * dropout.rescale, 0)
