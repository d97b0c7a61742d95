"""From a batch to tensors of few, fixed shapes: what a captured graph reads, filled in place without asking the device anything."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_lightning.fused.decoder import Tokens
from qlora_lightning.kernels.attention import Layout
from qlora_lightning.kernels.reference import IGNORED

LENGTH_STEP = 64
"""Rows are as long as a multiple of this: 8 lengths up to 512 tokens."""
PACKED_STEP = 256
"""Tokens of packed rows come in multiples of this."""
SEQUENCES_STEP = 16
LONGEST_STEP = 128


@dataclass(frozen=True)
class Shape:
    """What graphs are captured for: all that is fixed in one, rounded up from a batch."""

    rows: int
    length: int
    scored: int
    sequences: int = 0
    """Of packed rows, which lie as one row; 0 where each row is one sequence."""
    longest: int = 0

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.length


def shape_of(batch: dict[str, Any]) -> Shape:
    """The shape that holds ``batch``, from sizes that the host knows."""
    rows, length = batch["input_ids"].shape
    if "cu_seqlens" in batch:
        tokens = _up(rows * length, PACKED_STEP)
        sequences = _up(len(batch["cu_seqlens"]), SEQUENCES_STEP)  # one more than the batch has: for the padding behind it
        longest = min(_up(max(batch["longest"], tokens - rows * length), LONGEST_STEP), tokens)
        return Shape(1, tokens, _scored(len(batch["scored"]), tokens), sequences, longest)
    length = _up(length, LENGTH_STEP)
    return Shape(rows, length, _scored(len(batch["scored"]), rows * length))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _scored(count: int, tokens: int) -> int:
    """A quarter, a half or all of the tokens: the head is a small part of a step, and shapes are to be few."""
    return next(part for part in (-(-tokens // 4), -(-tokens // 2), tokens) if count <= part)


def empty_tokens(shape: Shape, device: torch.device) -> Tokens:
    """Tensors of ``shape``, to be filled."""
    count = shape.tokens
    packed = shape.sequences > 0
    borders = torch.zeros(shape.sequences + 1, dtype=torch.int32, device=device) if packed else None
    # Rows of one sequence each always have the same positions.
    positions = torch.arange(count, dtype=torch.int32, device=device) % shape.length
    return Tokens(
        ids=torch.zeros(count, dtype=torch.int64, device=device),
        positions=positions,
        scored=torch.full((shape.scored,), count, device=device),
        targets=torch.full((shape.scored,), IGNORED, device=device),
        seed=torch.zeros(1, dtype=torch.int64, device=device),
        layout=Layout(shape.rows, shape.length, borders, shape.longest),
    )


def fill(tokens: Tokens, shape: Shape, batch: dict[str, Any], seed: int) -> None:
    """Copy ``batch`` into ``tokens``; what is behind it keeps any token's id and is scored nowhere."""
    ids_BT, scored = batch["input_ids"], batch["scored"]
    length = ids_BT.shape[1]
    if shape.sequences:
        _fill_packed(tokens, shape, batch)
    else:
        tokens.ids.view(shape.rows, shape.length)[:, :length].copy_(ids_BT)
    behind = 0 if shape.sequences else shape.length - length  # padding that each row gains
    count = len(scored)
    tokens.scored[:count] = scored + (scored // length) * behind
    tokens.scored[count:] = shape.tokens
    tokens.targets[:count] = batch["labels"].flatten()[scored + 1]
    tokens.targets[count:] = IGNORED
    tokens.seed.fill_(seed)


def _fill_packed(tokens: Tokens, shape: Shape, batch: dict[str, Any]) -> None:
    """Rows become one; the padding behind them is a sequence by itself, and further ones are empty."""
    ids, borders = batch["input_ids"].flatten(), batch["cu_seqlens"]
    assert tokens.layout.cu_seqlens is not None
    tokens.ids[: len(ids)] = ids
    tokens.positions[: len(ids)] = batch["position_ids"].flatten()
    tokens.positions[len(ids) :] = _count_from_zero(tokens.positions[len(ids) :])
    tokens.layout.cu_seqlens[: len(borders)] = borders
    tokens.layout.cu_seqlens[len(borders) :] = shape.tokens


def _count_from_zero(positions: Tensor) -> Tensor:
    return torch.arange(len(positions), dtype=positions.dtype, device=positions.device)
