"""What ranks send each other, and how long it takes at a link's full speed: arithmetic, nothing measured.

A ring passes what it reduces around twice, what it gathers once; each of n ranks sends (n - 1) / n of the bytes each time.
"""

from dataclasses import dataclass

from qlora_lightning.plan.fleet import Fleet


@dataclass(frozen=True)
class Link:
    """What connects two devices."""

    name: str
    bytes_per_second: float
    """Of a device, in each direction."""


NVLINK, INFINIBAND, ETHERNET = Link("NVLink", 450e9), Link("InfiniBand", 50e9), Link("Ethernet", 12.5e9)
"""NVLink 4, as between H100s or H200s of a machine; 400 Gb/s a card; 100 Gb/s a card."""


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """To add up so many bytes over ranks and give each the sum."""
    return 2 * (ranks - 1) / ranks * size / link.bytes_per_second


def all_gather_seconds(size: float, ranks: int, link: Link) -> float:
    """To give each rank so many bytes, of which each has an equal part."""
    return (ranks - 1) / ranks * size / link.bytes_per_second


@dataclass(frozen=True)
class Traffic:
    """What a fleet communicates."""

    fleet: Fleet
    gradient: int
    """Bytes of the adapter's fp32 gradient, added up over ranks once a step."""
    packed: int
    """Bytes of all 4-bit weights. Divided among ranks, each microbatch gathers them twice: for forward, and for backward with what it
    computes again."""

    @property
    def link(self) -> Link:
        """The slowest on the way: NVLink inside of a machine, InfiniBand between machines."""
        return INFINIBAND if self.fleet.nodes > 1 else NVLINK

    @property
    def gathered(self) -> int:
        """Bytes gathered a microbatch."""
        return 2 * self.packed if self.fleet.sharded else 0

    @property
    def step_seconds(self) -> float:
        """Of the sum at a step's end, when nothing else is left to do."""
        return all_reduce_seconds(self.gradient, self.fleet.ranks, self.link)

    @property
    def microbatch_seconds(self) -> float:
        """Of the gathering, which goes on beside the computing."""
        return all_gather_seconds(self.gathered, self.fleet.ranks, self.link)
