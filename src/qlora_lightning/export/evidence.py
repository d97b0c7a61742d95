"""How far a merged model is from the live one, the 4-bit base with its adapter: KL and top-1 agreement, token by token, and perplexities.

The live model's log-probabilities over the whole vocabulary lie in a file in the meantime, so that one model at a time is in memory.
Shapes: N scored tokens of all rows, V vocabulary, B rows of a batch, T tokens fed, P positions whose logits are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora_lightning.evaluation.intervals import Estimate, share

Floats = npt.NDArray[np.float64]
Computing = Callable[[], AbstractContextManager[Any]]
BATCH_TOKENS = 2048
PIECE = 1 << 24
"""Log-probabilities that are worked on at once: 128 MiB in float64."""
RESAMPLES = 2000


class Row(NamedTuple):
    """A held-out sequence."""

    ids: npt.NDArray[np.int64]
    """[n], n at least 2."""
    scored: npt.NDArray[np.bool_]
    """[n - 1]: whether the prediction of the token behind each place counts."""


@dataclass(frozen=True)
class Measured:
    """What was measured at each scored token [N], in the order of ``in_batches``."""

    nll: Floats
    """-log p of the token that stands there, in nats."""
    kl: Floats
    """KL(live || this model), in nats; 0 for the live model itself."""
    agrees: Floats
    """1 where both think the same token likeliest, else 0."""
    row: npt.NDArray[np.int64]
    """Number of the row that the token is from."""


@dataclass(frozen=True)
class Figures:
    """Means over the scored tokens, each with the 95 % interval of what other rows of the same kind would give."""

    kl: Estimate
    """KL(live || merged) of a token, in nats."""
    top1: Estimate
    """Share of tokens at which both think the same one likeliest."""
    perplexity: Estimate
    """exp of the mean -log p."""
    kl_p99: float
    """KL that 99 of 100 tokens stay below."""


def in_batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Numbers of the rows, the longest first, in batches of ``BATCH_TOKENS`` with padding, or of one row that is longer."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].ids)):
        if batch and (len(batch) + 1) * len(rows[batch[0]].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class LiveRecord:
    """The live model's log-probabilities at every scored token, in a file of N x V fp32.

    Args:
        file: To be written.
        rows: What is measured on.
        vocabulary: V.
    """

    def __init__(self, file: Path, rows: Sequence[Row], vocabulary: int) -> None:
        self._rows, self._file = rows, file
        self._shape = (scored_tokens(rows), vocabulary)

    def record(self, model: Any, computing: Computing, device: torch.device, advance: Callable[[int], None]) -> Measured:
        """Fill the file by the live model.

        Args:
            model: In eval mode.
            computing: Makes the context in which it computes.
            device: That it takes its inputs on.
            advance: Is told of scored tokens that are done.
        """
        kept = np.memmap(self._file, np.float32, "w+", shape=self._shape)
        place, losses = 0, []
        for log_probs, targets in _log_probabilities(model, self._rows, computing, device, advance):
            kept[place : place + len(targets)] = log_probs.cpu().numpy()
            losses.append(_nll(log_probs, targets))
            place += len(targets)
        kept.flush()
        zeros = np.zeros(self._shape[0])
        return Measured(np.concatenate(losses), zeros, zeros + 1, _row_numbers(self._rows))

    def compare(self, model: Any, computing: Computing, device: torch.device, advance: Callable[[int], None]) -> Measured:
        """Measure another model of the same vocabulary against what the file holds; arguments as for ``record``."""
        kept = np.memmap(self._file, np.float32, "r", shape=self._shape)
        place, losses, kls, agreements = 0, [], [], []
        for log_probs, targets in _log_probabilities(model, self._rows, computing, device, advance):
            live = torch.from_numpy(np.array(kept[place : place + len(targets)])).to(log_probs.device)
            kls.append(_kl(live, log_probs).cpu().numpy())
            agreements.append((live.argmax(1) == log_probs.argmax(1)).double().cpu().numpy())
            losses.append(_nll(log_probs, targets))
            place += len(targets)
        return Measured(np.concatenate(losses), np.concatenate(kls), np.concatenate(agreements), _row_numbers(self._rows))


def scored_tokens(rows: Sequence[Row]) -> int:
    """N."""
    return int(sum(row.scored.sum() for row in rows))


@torch.inference_mode()
def _log_probabilities(
    model: Any, rows: Sequence[Row], computing: Computing, device: torch.device, advance: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [n, V] in fp32 and the tokens that follow [n], piece by piece.

    No attention mask is passed: rows are padded on the right, and a causal model's earlier tokens never see what follows.
    """
    for numbers in in_batches(rows):
        inputs_BT, targets_BT, scored_BT = (part.to(device) for part in _padded([rows[number] for number in numbers]))
        positions_P = scored_BT.any(0).nonzero().flatten()
        with computing():
            logits_BPV = model(input_ids=inputs_BT, logits_to_keep=positions_P, use_cache=False).logits
        kept_BP = scored_BT[:, positions_P]
        logits_nV, targets_n = logits_BPV[kept_BP], targets_BT[:, positions_P][kept_BP]
        piece = max(1, PIECE // logits_nV.shape[1])
        for logits, targets in zip(logits_nV.split(piece), targets_n.split(piece), strict=True):
            yield logits.float().log_softmax(1), targets
            advance(len(targets))


def _padded(batch: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """What is fed, what follows each place, and whether that is scored: all [B, T]."""
    width = max(len(row.ids) for row in batch) - 1
    inputs, targets = torch.zeros(len(batch), width, dtype=torch.int64), torch.zeros(len(batch), width, dtype=torch.int64)
    scored = torch.zeros(len(batch), width, dtype=torch.bool)
    for place, row in enumerate(batch):
        fed = len(row.ids) - 1
        inputs[place, :fed], targets[place, :fed] = torch.from_numpy(row.ids[:-1]), torch.from_numpy(row.ids[1:])
        scored[place, :fed] = torch.from_numpy(row.scored)
    return inputs, targets, scored


def _kl(live_NV: Tensor, merged_NV: Tensor) -> Tensor:
    """KL(live || merged) [N] in float64.

    The usual sum of p (log p - log q) is off, and may be below 0, by as much as p and q in fp32 fail to add up to 1: 1e-7, the size of
    what is measured where two models are nearly equal. p (log p - log q) - p + q adds up to the same, and no term of it is below 0.
    """
    ratio = (live_NV - merged_NV).double()
    return (live_NV.double().exp() * (ratio + torch.expm1(-ratio))).sum(1)


def _nll(log_probs: Tensor, targets: Tensor) -> Floats:
    losses: Floats = -log_probs.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
    return losses


def _row_numbers(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    order = [number for batch in in_batches(rows) for number in batch]
    return np.repeat(order, [int(rows[number].scored.sum()) for number in order]).astype(np.int64)


# ---- arithmetic ----


def figures(measured: Measured) -> Figures:
    """The means with their intervals."""
    loss = interval(measured.nll, measured.row)
    return Figures(
        kl=interval(measured.kl, measured.row),
        top1=_share(measured.agrees, measured.row),
        perplexity=Estimate(*(float(np.exp(bound)) for bound in loss)),
        kl_p99=float(np.quantile(measured.kl, 0.99)),
    )


def _share(hits: Floats, rows: npt.NDArray[np.int64]) -> Estimate:
    """As ``interval``, at least as wide as Wilson's: where all tokens agree, rows drawn anew would know no doubt."""
    drawn, wilson = interval(hits, rows), share(int(hits.sum()), len(hits))
    return Estimate(drawn.value, min(drawn.low, wilson.low), max(drawn.high, wilson.high))


def interval(values: Floats, rows: npt.NDArray[np.int64]) -> Estimate:
    """The mean of values [N] and its 95 % interval: rows drawn anew, as the tokens of one row are alike (percentile bootstrap, own seed).

    Of a single row its tokens are drawn, for want of better.
    """
    if len(np.unique(rows)) == 1:
        rows = np.arange(len(values))
    _, place = np.unique(rows, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    means = drawn @ sums / (drawn @ counts)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))
