"""Where a plan is to be carried out: this machine's device, or a GPU of any size that need not be here."""

import os
import resource
import sys
from dataclasses import dataclass

import torch

from qlora_lightning.fused.budget import GIB
from qlora_lightning.fused.memory import CONTEXT, taken_elsewhere

SIZES = (24, 48, 80, 141)
"""GiB of the GPUs that a plan is shown for on a machine without one: a 3090 or 4090, an A6000 or L40S, an A100 or H100, an H200."""
_PROCESSORS = 132
"""Multiprocessors of a GPU that is not here: those of an H100 and H200; consumer cards and A100 have about as many."""


@dataclass(frozen=True)
class Target:
    """A device to plan for."""

    name: str
    cuda: bool
    total: int
    """Bytes."""
    elsewhere: int
    """Bytes that are taken beside the run's tensors: CUDA's context and other processes; on a CPU Python and its libraries."""
    processors: int = _PROCESSORS
    """Multiprocessors, on which the scratch memory of FlashAttention 2's backward depends."""
    here: bool = False
    """Whether it is this machine's."""


def gpu_of(gib: float) -> Target:
    """A GPU of so many GiB, with nothing else on it."""
    return Target(f"a GPU of {gib:g} GiB", True, int(gib * GIB), CONTEXT)


def this_device(device: torch.device) -> Target:
    """The device that the Trainer chose here."""
    if device.type == "cuda":
        elsewhere, total = taken_elsewhere(device)
        about = torch.cuda.get_device_properties(device)
        return Target(about.name, True, total, elsewhere, about.multi_processor_count, here=True)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Target("this machine's CPU", False, total, taken, here=True)
