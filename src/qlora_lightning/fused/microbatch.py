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
PACKED_STEP = 128
"""Tokens without padding come in multiples of this, which products' tiles have as rows."""
COARSE_STEP, COARSE = 256, range(1024, 4096)
"""So many come in multiples of this: the host keeps the GPU waiting there but for captured shapes, and fewer shapes come again sooner."""
SEQUENCES_STEP = 16
LONGEST_STEP = 512
"""The longest sequence is only a bound, which costs attention next to nothing: few values make few shapes."""
WORTH = 0.98
"""Rows are laid end to end, without their padding, where that leaves at most this part of the tokens."""


@dataclass(frozen=True)
class Shape:
    """What graphs are captured for: all that is fixed in one, rounded up from a batch."""

    rows: int
    length: int
    scored: int
    sequences: int = 0
    """Of tokens that lie end to end, as one row; 0 where each row is one sequence."""
    longest: int = 0

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.length


def shape_of(batch: dict[str, Any]) -> Shape:
    """The shape that holds ``batch``, from sizes that the host knows.

    Packed rows, and rows of unlike length, lie end to end: products then see next to no padding. Rows of like length stay rows.
    """
    rows, length = batch["input_ids"].shape
    if "cu_seqlens" in batch:
        return _end_to_end(rows * length, len(batch["cu_seqlens"]) - 1, batch["longest"], batch)
    width = _up(length, LENGTH_STEP)
    joined = _end_to_end(sum(batch["row_lengths"]), rows, max(batch["row_lengths"]), batch)
    if joined.tokens <= WORTH * rows * width:
        return joined
    return Shape(rows, width, _scored(len(batch["scored"]), rows * width))


def _end_to_end(tokens: int, sequences: int, longest: int, batch: dict[str, Any]) -> Shape:
    room = packed_room(tokens)
    longest = min(_up(max(longest, room - tokens), LONGEST_STEP), room)  # what fills the room up is a sequence too
    return Shape(1, room, _scored(len(batch["scored"]), room), _up(sequences + 1, SEQUENCES_STEP), longest)


def packed_room(tokens: int) -> int:
    """Tokens that so many take without padding."""
    return _up(tokens, COARSE_STEP if tokens in COARSE else PACKED_STEP)


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
    if "cu_seqlens" in batch:
        scored = _fill_packed(tokens, shape, batch)
    elif shape.sequences:
        scored = _fill_joined(tokens, shape, batch)
    else:
        scored = _fill_rows(tokens, shape, batch)
    count = len(scored)
    tokens.scored[:count] = scored
    tokens.scored[count:] = shape.tokens
    tokens.targets[:count] = batch["labels"].flatten()[batch["scored"] + 1]
    tokens.targets[count:] = IGNORED
    tokens.seed.fill_(seed)


def _fill_rows(tokens: Tokens, shape: Shape, batch: dict[str, Any]) -> Tensor:
    """Rows side by side, each longer by the same padding; the scored tokens' numbers there."""
    ids_BT, scored = batch["input_ids"], batch["scored"]
    length = ids_BT.shape[1]
    tokens.ids.view(shape.rows, shape.length)[:, :length].copy_(ids_BT)
    renumbered: Tensor = scored + (scored // length) * (shape.length - length)
    return renumbered


def _fill_packed(tokens: Tokens, shape: Shape, batch: dict[str, Any]) -> Tensor:
    """Packed rows become one; their padding stays."""
    ids = batch["input_ids"].flatten()
    tokens.ids[: len(ids)] = ids
    _set_borders(tokens, shape, batch["cu_seqlens"])
    scored: Tensor = batch["scored"]
    return scored


def _fill_joined(tokens: Tokens, shape: Shape, batch: dict[str, Any]) -> Tensor:
    """Rows become one without their padding."""
    ids_BT, scored, starts = batch["input_ids"], batch["scored"], batch["row_starts"]
    length, count = ids_BT.shape[1], sum(batch["row_lengths"])
    numbers = torch.arange(count, dtype=torch.int32, device=ids_BT.device)
    rows = torch.searchsorted(starts, numbers, right=True) - 1
    tokens.ids[:count] = ids_BT.flatten()[rows * length + numbers - starts[rows]]
    _set_borders(tokens, shape, starts)
    scored_rows = scored // length
    renumbered: Tensor = scored - scored_rows * length + starts[scored_rows]
    return renumbered


def _set_borders(tokens: Tokens, shape: Shape, borders: Tensor) -> None:
    """Sequences and positions; what fills the row up is a sequence by itself, and further ones are empty."""
    assert tokens.layout.cu_seqlens is not None
    tokens.layout.cu_seqlens[: len(borders)] = borders
    tokens.layout.cu_seqlens[len(borders) :] = shape.tokens
    numbers = torch.arange(shape.tokens, dtype=torch.int32, device=borders.device)
    sequences = torch.searchsorted(tokens.layout.cu_seqlens, numbers, right=True) - 1
    tokens.positions.copy_(numbers - tokens.layout.cu_seqlens[sequences])
