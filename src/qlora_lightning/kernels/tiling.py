"""How a sum is divided among programs: fixed by shape and device, so that a resumed run rounds as the uninterrupted one did."""

from collections.abc import Iterator
from functools import cache

import torch
from triton.runtime import driver

_FIXED_STEPS = 4
"""What a program costs beside its steps (filling the pipeline, writing its part of the sum), in steps."""


@cache
def splits(programs: int, steps: int, resident: int, device: torch.device) -> int:
    """In how many parts to divide the steps of every program, so that whole rounds of the device are filled.

    Args:
        programs: that the rest of the shape gives.
        steps: equal pieces of work, summed over.
        resident: programs that a multiprocessor runs at a time.
        device: where they run.
    """
    slots = resident * _multiprocessors(device)

    def duration(parts: int) -> int:
        rounds = -(-programs * parts // slots)
        return rounds * (-(-steps // parts) + _FIXED_STEPS)

    return min(range(1, steps + 1), key=duration)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # Triton's interpreter: enough for sums to be shared
    return torch.cuda.get_device_properties(device).multi_processor_count


def rank_block(rank: int) -> int:
    """Columns of a tile that holds ``rank`` of them: a power of two, as tensor cores take them."""
    return max(16, 1 << (rank - 1).bit_length())


def layer_groups(layers: int, rank: int, accumulated: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of the layers that one launch can serve: all, or one by one where their sums would not fit in registers.

    Args:
        layers: in the group, at most 3.
        rank: r.
        accumulated: columns of sums that a program can hold.
    """
    together = layers if layers * rank_block(rank) <= accumulated else 1
    for first in range(0, layers, together):
        yield first, together


@cache
def stages(wanted: int, each: int, besides: int, device: torch.device) -> int:
    """Tiles that a program can have on their way at a time, at most ``wanted``: Ampere and Ada have less shared memory than Hopper.

    Args:
        wanted: where memory allows.
        each: bytes of one stage.
        besides: bytes that the program holds all the time.
        device: where it runs.
    """
    if device.type != "cuda":
        return wanted
    shared = driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    return max(1, min(wanted, (shared - besides) // each))
