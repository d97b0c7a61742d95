"""A checksum of packed weights that a GPU computes as fast as it reads them, the same on every device."""

from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**20  # bytes at once, whose products take 16 MiB


def checksum_of_packed(codes: Tensor, state: Any) -> int:
    """Of a 4-bit weight: its codes and bitsandbytes' constants.

    Args:
        codes: all packed bytes, of any shape.
        state: bitsandbytes' QuantState of the weight.
    """
    constants = [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    return sum(number * checksum(part) for number, part in enumerate((codes, *constants), start=1)) % 2**63


def checksum(values: Tensor) -> int:
    """64 bits of a tensor's bytes; a change of one bit always changes it, and so does an exchange of two different bytes.

    The sum modulo 2^64 of each byte times an odd number that grows with its place: sums of integers do not depend on their order, so every
    device finds the same one.
    """
    octets = values.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=octets.device)
    for start in range(0, octets.numel(), _CHUNK):
        part = octets[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(2 * start + 1, 2 * (start + part.numel()) + 1, 2, device=octets.device)
        total += part.add_(1).mul_(places).sum()
    return int(total)
