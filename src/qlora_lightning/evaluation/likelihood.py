"""How likely a model finds tokens, in batches and in bounded memory: what all measurements by likelihood share.

Shapes: B sequences of a batch, T tokens fed, K positions whose logits are kept, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.data.dataset import IGNORED
from qlora_lightning.modeling.tokenizer import filler_id
from qlora_lightning.modeling.trained import TrainedModel

Tokens = npt.NDArray[np.int64]
PIECE = 1 << 26
"""Logits that exist in fp32 at once: 256 MiB, whatever the batch and the vocabulary."""


@dataclass(frozen=True)
class Scored:
    """Tokens of which a model is asked how likely the last ones are, given those before them."""

    ids: Tokens
    """At least two. The last one is never fed, as nothing follows it: a model of N positions takes N + 1."""
    scored: int
    """How many of them, counted from the end, are scored: at least 1 and fewer than there are."""


def negative_log_likelihoods(
    trained: TrainedModel, sequences: Sequence[Scored], batch_size: int, advance: Callable[[int], None] = lambda tokens: None
) -> npt.NDArray[np.float64]:
    """Sum of -log p over the scored tokens of each sequence [S], in nats.

    The longest go first: what does not fit into memory fails at once, and a batch has little padding.

    Args:
        trained: The model.
        sequences: S of them, in any order.
        batch_size: Sequences fed at once.
        advance: Is told the number of scored tokens of each batch that is done.
    """
    sums = np.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [sequences[index] for index in chosen]
        sums[chosen] = _batch(trained, batch).cpu().numpy()
        advance(sum(sequence.scored for sequence in batch))
    return sums


@torch.inference_mode()
def _batch(trained: TrainedModel, batch: Sequence[Scored]) -> Tensor:
    """Sums [B] in float64.

    No attention mask is passed: rows are padded on the right, and a causal model's earlier tokens never see what follows.
    """
    inputs_BT, labels_BT = _padded(batch, filler_id(trained.tokenizer))
    kept = max(inputs_BT.shape[1] - (len(one.ids) - 1 - one.scored) for one in batch)
    with trained.computing():
        logits_BKV = trained.model(input_ids=inputs_BT.to(trained.device), logits_to_keep=kept, use_cache=False).logits
    return _cross_entropy(logits_BKV, labels_BT[:, -kept:].to(trained.device)).sum(1)


def _padded(batch: Sequence[Scored], filler: int) -> tuple[Tensor, Tensor]:
    """What is fed, and at each place the token that follows it, ``IGNORED`` where that is not scored: both [B, T]."""
    width = max(len(one.ids) for one in batch) - 1
    inputs = torch.full((len(batch), width), filler)
    labels = torch.full_like(inputs, IGNORED)
    for row, one in enumerate(batch):
        fed = len(one.ids) - 1
        inputs[row, :fed] = torch.from_numpy(one.ids[:-1])
        labels[row, fed - one.scored : fed] = torch.from_numpy(one.ids[-one.scored :])
    return inputs, labels


def _cross_entropy(logits_BKV: Tensor, labels_BK: Tensor) -> Tensor:
    """-log p of each label [B, K] in float64, 0 where it is ``IGNORED``; computed in fp32, piece by piece."""
    positions = max(1, PIECE // logits_BKV.shape[-1])
    pieces = zip(logits_BKV.flatten(0, 1).split(positions), labels_BK.flatten().split(positions), strict=True)
    losses = [F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none").double() for logits, labels in pieces]
    return torch.cat(losses).view(labels_BK.shape)
