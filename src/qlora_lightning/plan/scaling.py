"""How a run scales to many cards, by arithmetic: steps as one card was measured to take them, and links at their full speed.

``docs/scaling.md`` shows these tables; a test compares them.
"""

from dataclasses import dataclass

from qlora_lightning.plan.communication import ETHERNET, INFINIBAND, NVLINK, Link, all_gather_seconds, all_reduce_seconds

FLEETS = ((2, NVLINK), (4, NVLINK), (8, NVLINK), (16, INFINIBAND), (64, INFINIBAND), (64, ETHERNET))
"""Ranks, and the slowest link between them."""
GOAL = 0.95
"""Share of the time in which a card should compute."""


@dataclass(frozen=True)
class Point:
    """One card's step, as ``benchmarks/2026-11-23-fused-7b-h200.md`` measured it."""

    name: str
    tokens: int
    """Of a microbatch."""
    tokens_per_second: float
    trained: int
    """Values of the adapter, in fp32."""
    linear: int
    """Parameters of the 4-bit layers."""

    @property
    def seconds(self) -> float:
        """Of a step of one microbatch."""
        return self.tokens / self.tokens_per_second


_7B, _65B = (159_907_840, 6_476_005_376), (799_539_200, 64_760_053_760)  # LoRA r 64 on all linear layers; those layers
POINTS = (
    Point("7B, 16 x 512, `full`", 8192, 14_403, *_7B),
    Point("7B, 4 x 2048, `none`", 8192, 18_731, *_7B),
    Point("7B, 1 x 512, `none`", 512, 10_872, *_7B),
    Point("65B, 8 x 512, `auto`", 4096, 2_235, *_65B),
    Point("65B, 1 x 512, `auto`", 512, 1_500, *_65B),
)


def efficiency(point: Point, ranks: int, link: Link, microbatches: int = 1) -> float:
    """Share of a step in which cards compute. The gradient is added up behind the last microbatch, beside nothing else."""
    computing = microbatches * point.seconds
    return computing / (computing + all_reduce_seconds(point.trained * 4, ranks, link))


def least_tokens(point: Point, ranks: int, link: Link, goal: float = GOAL) -> int:
    """Tokens a step that each card must have to reach ``goal``, at the point's speed."""
    waiting = all_reduce_seconds(point.trained * 4, ranks, link)
    return round(waiting * goal / (1 - goal) * point.tokens_per_second)


def efficiency_rows() -> list[str]:
    """A row of the document's table for each point."""
    return [_row(point.name, *(f"{efficiency(point, *fleet):.1%}" for fleet in FLEETS)) for point in POINTS]


def tokens_rows() -> list[str]:
    """The same of ``least_tokens``."""
    return [_row(point.name, *(f"{least_tokens(point, *fleet):,}" for fleet in FLEETS)) for point in POINTS]


def gather_rows() -> list[str]:
    """For each fleet, milliseconds in which a microbatch gathers 65B's divided weights, forward and backward together, and the tokens in
    whose computing, at the speed of the measured fused path, that time is hidden."""
    point = POINTS[3]
    rows = []
    for ranks, link in FLEETS:
        seconds = 2 * all_gather_seconds(point.linear / 2, ranks, link)
        rows.append(_row(f"{ranks}, {link.name}", f"{seconds * 1e3:,.0f}", f"{round(seconds * point.tokens_per_second):,}"))
    return rows


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
