"""Which rung each block stands on: all that a memory budget allows is kept, the rest computed again. From shapes, before a step runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lightning.errors import UserError
from qlora_lightning.fused.block import MLP_TILE
from qlora_lightning.fused.decoder import LOGITS_BYTES
from qlora_lightning.fused.rungs import BlockShape, Rung

GIB = 2**30
MARGIN = 0.025
"""Of the budget, left free: torch reserves more than it allocates, since free memory lies in pieces; 2.2 to 3.1 % more at 22 to 44 GiB."""

SMALLEST_MARGIN = int(0.4 * GIB)
"""Left free beside: of 6 to 10 GiB torch reserves 4 to 6 % more, and graphs take some of the device that torch does not count."""

ROUNDED_UP = 1.15
"""What torch reserves of short-lived tensors over their sizes, until a first step has been measured."""


@dataclass(frozen=True)
class Budget:
    """What activations may take.

    Attributes:
        total: bytes that the run may use in all.
        held: bytes of what is there before a step: weights, adapter, gradients, the optimizer's state, CUDA's context.
        correction: measured over planned peak of the activations, of the first step.
    """

    total: int
    held: int
    correction: float = 1.0

    @property
    def free(self) -> int:
        """Bytes for activations and what a pass works with."""
        return int(self.total * (1 - MARGIN)) - SMALLEST_MARGIN - self.held


def total_for(num_bytes: float) -> float:
    """The smallest budget in which so many bytes fit, margin and all."""
    return (num_bytes + SMALLEST_MARGIN) / (1 - MARGIN)


def left_for_weights(budget: Budget, needed: int) -> int:
    """Bytes that weights in 16 bits may take: half of what graphs and an eager microbatch leave, each of which needs ``needed``.

    The other half is for what is not planned: validation, samples, other programs.
    """
    return max(0, budget.free - 2 * needed) // 2


def working_bytes(block: BlockShape, tokens: int, rungs: Sequence[Rung], vocabulary: int) -> int:
    """Bytes that a step needs for a moment, at its fullest, beside what blocks keep: in 16 bits.

    Args:
        block: sizes of a block.
        tokens: of a microbatch.
        rungs: on which the blocks stand.
        vocabulary: rows of the head.
    """
    qkv = block.query + block.key_value
    tile = min(tokens, MLP_TILE)
    weights_first = block.hidden * (qkv + block.query)
    weights_second = 3 * block.hidden * block.intermediate
    made_again = 0 if max(rungs) <= Rung.NO_MLP else tokens * (qkv + (2 * block.query if max(rungs) == Rung.INPUT else 0))
    dx = tokens * block.hidden
    first = made_again + tokens * (qkv + 2 * block.query + block.hidden) + weights_first
    second = made_again + tile * (3 * block.intermediate + 2 * block.hidden) + weights_second
    expanded = 2 * block.query if block.key_value < 2 * block.query else 0  # a gradient of k and v for each query head, before their sums
    attention = made_again + tokens * (qkv + block.query * (1 + 2 * block.dq_copies) + expanded)
    head = min(LOGITS_BYTES // 2, tokens * vocabulary) + 3 * tokens * block.hidden
    on_their_way = 2 * tokens * block.hidden if block.input_on_host else 0
    return int(2 * (dx + on_their_way + max(first, second, attention, head)) * ROUNDED_UP)


def kept_bytes(block: BlockShape, tokens: int, rungs: Sequence[Rung]) -> int:
    """Bytes that all blocks keep."""
    return tokens * sum(block.kept_bytes(rung) for rung in rungs)


def planned_bytes(block: BlockShape, tokens: int, rungs: Sequence[Rung], vocabulary: int) -> int:
    """The step's peak, beyond what is there before it."""
    return kept_bytes(block, tokens, rungs) + working_bytes(block, tokens, rungs, vocabulary)


def plan_rungs(block: BlockShape, layers: int, tokens: int, length: int, vocabulary: int, budget: Budget) -> list[Rung]:
    """What each block keeps, so that backward repeats as little as the budget allows.

    Blocks are equal, so only how many stand on each rung matters: all mixtures of two rungs are tried, and the one that fits with
    fewest repeated operations is taken. The first blocks keep least, since what they keep is held longest.

    Args:
        block: sizes of a block.
        layers: number of blocks.
        tokens: of a microbatch.
        length: of its sequences.
        vocabulary: rows of the head.
        budget: what they may take.

    Raises:
        UserError: the microbatch does not fit even where each block keeps its input alone.
    """
    best: tuple[float, list[Rung]] | None = None
    for more in Rung:
        for less in Rung:
            if less < more:
                continue
            count = _most_on(more, less, block, layers, tokens, vocabulary, budget)
            if count is None:
                continue
            rungs = [less] * (layers - count) + [more] * count
            repeated = sum(block.recomputed_flops(rung, length) for rung in rungs)
            if best is None or repeated < best[0]:
                best = repeated, rungs
    if best is None:
        least = [Rung.INPUT] * layers
        needed = total_for(budget.held + planned_bytes(block, tokens, least, vocabulary) * budget.correction) / GIB
        raise UserError(
            f"a microbatch of {tokens:,} tokens needs {needed:.1f} GiB in all, and {budget.total / GIB:.1f} GiB may be used; raise "
            "trainer.accumulate_grad_batches (fewer rows at a time), lower data.dataset.max_length, set "
            "trainer.strategy.optimizer_bits: 8, or raise trainer.strategy.memory_budget_gib"
        )
    return best[1]


def _most_on(more: Rung, less: Rung, block: BlockShape, layers: int, tokens: int, vocabulary: int, budget: Budget) -> int | None:
    """How many blocks may stand on ``more`` with the others on ``less``; None where not even the smallest number fits."""
    for count in range(layers, -1, -1):
        rungs = [less] * (layers - count) + [more] * count
        if planned_bytes(block, tokens, rungs, vocabulary) * budget.correction <= budget.free:
            return count
    return None


def describe_rungs(rungs: Sequence[Rung]) -> str:
    """For the log: how many blocks keep what."""
    names = {
        Rung.ALL: "keep everything",
        Rung.NO_MLP: "compute gate and up again",
        Rung.ATTENTION: "keep their inputs and attention's result",
        Rung.INPUT: "keep their input alone",
    }
    return ", ".join(f"{rungs.count(rung)} {names[rung]}" for rung in Rung if rung in rungs)
