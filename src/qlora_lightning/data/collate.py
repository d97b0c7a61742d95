"""Examples to a padded batch. Masks and labels come from lengths, never from the pad id: a row may well contain that token.

Shapes: B rows, T tokens a row (padded), P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora_lightning.data.dataset import IGNORED, TokenizedExample
from qlora_lightning.data.heldout import HeldoutExample
from qlora_lightning.data.steps import Microbatch


class Batch(TypedDict):
    """One microbatch."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor
    """[B, T] int64: 1 for tokens, 0 for padding."""
    labels: Tensor
    """[B, T] int64: not shifted; -100 where there is no loss."""
    logit_positions: Tensor
    """[P] int64, sorted: the positions t for which some row has a label at t + 1. Logits are needed there only."""
    scored: Tensor
    """[num_supervised] int64, sorted: the tokens, counted through the rows (b * T + t), whose next one is a target."""
    tokens_in_step: int
    """Supervised targets (labels at 1 and later) over all microbatches and ranks of the optimizer step."""
    num_tokens: int
    """Input tokens of this microbatch without padding."""
    num_supervised: int
    """Supervised targets of this microbatch."""
    row_lengths: list[int]
    """Tokens of each row without padding."""
    row_starts: Tensor
    """[B + 1] int32: where each row would begin if there were no padding, and the end."""
    position_ids: NotRequired[Tensor]
    """[B, T] int64, where some row holds several examples: from 0 in each example and in the padding; so a model tells them apart."""
    cu_seqlens: NotRequired[Tensor]
    """[sequences + 1] int32, with ``position_ids``: where each begins, counted through the rows, and the end; padding is one too."""
    longest: NotRequired[int]
    """Tokens of the longest of them."""
    examples: NotRequired[npt.NDArray[np.int64]]
    """In training, which ones they are: see ``Microbatch.rows``. An array of numpy's, which no device is given."""


class HeldoutBatch(Batch):
    """Examples to score. What is known of each row is a plain number, which no device has to be asked for."""

    row_sets: list[int]
    """Of each row, the number of its set among those that have held-out rows."""
    row_targets: list[int]
    """Supervised targets of each row."""


class PromptBatch(TypedDict):
    """Prompts for generation, padded on the left so that the next token follows each row's last."""

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Collator:
    """Pads examples to batches.

    Attributes:
        filler_id: what stands in padding; any id of the vocabulary does.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    filler_id: int
    pad_to_multiple_of: int

    def train(self, fetched: tuple[Microbatch, Sequence[Sequence[TokenizedExample]]]) -> Batch:
        """A microbatch of a planned optimizer step, from the examples of each row."""
        microbatch, rows = fetched
        batch = self.evaluation([_joined(row) for row in rows])
        batch["tokens_in_step"] = microbatch.tokens_in_step
        batch["examples"] = np.array(microbatch.indices, np.int64)
        if any(len(row) > 1 for row in rows):
            lengths = _sequence_lengths(rows, batch["input_ids"].shape[1])
            batch["position_ids"] = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
            flat = [length for row in lengths for length in row]
            batch["cu_seqlens"] = torch.tensor([0, *accumulate(flat)], dtype=torch.int32)
            batch["longest"] = max(flat)
        return _without_labels(batch) if microbatch.filler else batch

    def evaluation(self, examples: Sequence[TokenizedExample]) -> Batch:
        """A batch that stands for itself: its step is the batch."""
        row_lengths = [len(example.input_ids) for example in examples]
        lengths = torch.tensor(row_lengths)
        labels = self._pad([example.labels for example in examples], IGNORED)
        targets = labels[:, 1:] != IGNORED
        count = int(targets.sum())
        return Batch(
            input_ids=self._pad([example.input_ids for example in examples], self.filler_id),
            attention_mask=(torch.arange(labels.shape[1]) < lengths[:, None]).long(),
            labels=labels,
            logit_positions=targets.any(dim=0).nonzero().flatten(),
            scored=torch.nn.functional.pad(targets, (0, 1)).flatten().nonzero().flatten(),
            tokens_in_step=count,
            num_tokens=int(lengths.sum()),
            num_supervised=count,
            row_lengths=row_lengths,
            row_starts=torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32),
        )

    def heldout(self, examples: Sequence[HeldoutExample]) -> HeldoutBatch:
        """A batch to score, which tells its rows apart."""
        batch = self.evaluation([one.example for one in examples])
        return HeldoutBatch(
            **batch,
            row_sets=[one.set for one in examples],
            row_targets=(batch["labels"][:, 1:] != IGNORED).sum(1).tolist(),
        )

    def prompts(self, prompts: Sequence[npt.NDArray[np.int32]]) -> PromptBatch:
        """Token ids of prompts, left-padded."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        input_ids = self._pad([prompt[::-1] for prompt in prompts], self.filler_id).flip(1)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).flip(1)
        return PromptBatch(input_ids=input_ids, attention_mask=mask.long())

    def _pad(self, rows: Sequence[npt.NDArray[np.int32]], filler: int) -> Tensor:
        multiple = self.pad_to_multiple_of
        width = -(-max(len(row) for row in rows) // multiple) * multiple
        padded = np.full((len(rows), width), filler, dtype=np.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        return torch.from_numpy(padded)


def _joined(row: Sequence[TokenizedExample]) -> TokenizedExample:
    """The examples of a row as one. Nothing predicts an example's first token, which the last one of the example before would."""
    labels = np.concatenate([example.labels for example in row])
    labels[np.cumsum([0] + [len(example.labels) for example in row[:-1]])] = IGNORED
    return TokenizedExample(np.concatenate([example.input_ids for example in row]), labels)


def _sequence_lengths(rows: Sequence[Sequence[TokenizedExample]], width: int) -> list[list[int]]:
    """Tokens of each example of each row, and of the padding behind them, which is a sequence of its own."""
    lengths = [[len(example.input_ids) for example in row] for row in rows]
    return [[*row, width - sum(row)] if sum(row) < width else row for row in lengths]


def _without_labels(batch: Batch) -> Batch:
    """A batch that adds nothing to the loss, for a rank that has no example in a step's last microbatch."""
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    batch["logit_positions"], batch["scored"] = batch["logit_positions"][:0], batch["scored"][:0]
    batch["num_tokens"] = batch["num_supervised"] = 0
    batch["examples"] = batch["examples"][:0]
    return batch
