"""The held-out examples, each with the set that it is from, and their loss kept apart by set and by length.

Every row's loss is known where the loss of all is: to keep the rows apart costs no second pass.

Shapes: B rows of a batch, S sets, L buckets of lengths.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora_lightning.data.dataset import IGNORED, TokenizedDataset, TokenizedExample
from qlora_lightning.data.sets import RowSet
from qlora_lightning.data.shares import Share

_BORDERS = (128, 256, 512, 1024)
T = TypeVar("T")
BUCKETS = ("0-127", "128-255", "256-511", "512-1023", "1024+")
"""Names of the buckets: tokens of an example, prompt and answers, both ends included."""


class HeldoutExample(NamedTuple):
    """An example and the number of its set among those that have held-out rows."""

    example: TokenizedExample
    set: int


class HeldoutExamples:
    """A rank's share of the examples of ``dataset``, which go longest first, so that a lack of memory shows at once and rows of like length
    share a batch. Of an example that only keeps the rank in time no token is scored."""

    def __init__(self, dataset: TokenizedDataset, share: Share) -> None:
        self._dataset, self._share = dataset, share
        self._order = np.argsort(-dataset.lengths, kind="stable")
        self._sets = np.repeat(np.arange(len(dataset.parts)), [number for number, _ in dataset.parts])

    def __len__(self) -> int:
        return len(self._share.rows)

    def __getitem__(self, index: int) -> HeldoutExample:
        place = int(self._order[self._share.rows[index]])
        example = self._dataset[place]
        if not self._share.counts(index):
            example = example._replace(labels=np.full_like(example.labels, IGNORED))
        return HeldoutExample(example, int(self._sets[place]))


class HeldoutPrompt(NamedTuple):
    """The tokens that ask for a held-out conversation's last answer."""

    input_ids: npt.NDArray[np.int32]
    number: int | None
    """The conversation's, in the order of ``heldout_conversations``; None for a prompt that only keeps the rank in time."""


class HeldoutPrompts:
    """A rank's share of the prompts."""

    def __init__(self, prompts: Sequence[npt.NDArray[np.int32]], share: Share) -> None:
        self._prompts, self._share = prompts, share

    def __len__(self) -> int:
        return len(self._share.rows)

    def __getitem__(self, index: int) -> HeldoutPrompt:
        place = self._share.rows[index]
        return HeldoutPrompt(self._prompts[place], place if self._share.counts(index) else None)


class HeldoutSums:
    """Cross-entropy and number of scored tokens, added up by set and length bucket.

    Losses stay on their device until they are asked for: to read those of each batch would make it wait.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._tokens: list[int] = []
        self._sets: list[int] = []
        self._lengths: list[int] = []

    def add(self, losses_B: Tensor, tokens: Iterable[int], sets: Iterable[int], lengths: Iterable[int]) -> None:
        """Add a batch.

        Args:
            losses_B: summed cross-entropy of each row, float64.
            tokens: scored tokens of each row.
            sets: number of each row's set.
            lengths: tokens of each row, without padding.
        """
        self._losses.append(losses_B)
        self._tokens += tokens
        self._sets += sets
        self._lengths += lengths

    def table(self, sets: int) -> Tensor:
        """Sums over all rows so far, float64 [S, L, 2]: cross-entropy and tokens. Ranks may add theirs up: the shape is always the same."""
        buckets = np.searchsorted(_BORDERS, self._lengths, side="right")
        cells = torch.from_numpy(np.asarray(self._sets) * len(BUCKETS) + buckets)
        values = torch.stack([torch.cat(self._losses).cpu(), torch.tensor(self._tokens, dtype=torch.float64)], dim=1)
        sums = torch.zeros(sets * len(BUCKETS), 2, dtype=torch.float64).index_add_(0, cells, values)
        return sums.view(sets, len(BUCKETS), 2)


def heldout_metrics(table_SL2: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean cross-entropy a token, and perplexity: of all, of each set where there are several, and of each length bucket with tokens.

    Args:
        table_SL2: as ``HeldoutSums.table`` gives it.
        names: of the sets.

    Returns:
        Name, as in loss, perplexity, loss/<set>, loss_by_length/<bucket>, -> float32 scalar.
    """
    metrics = _loss_and_perplexity(table_SL2.sum((0, 1)), "")
    if len(names) > 1:
        for name, sums in zip(names, table_SL2.sum(1), strict=True):
            metrics |= _loss_and_perplexity(sums, f"/{name}")
    for bucket, sums in zip(BUCKETS, table_SL2.sum(0), strict=True):
        if sums[1] > 0:
            metrics[f"loss_by_length/{bucket}"] = (sums[0] / sums[1]).float()
    return metrics


def _loss_and_perplexity(sums: Tensor, suffix: str) -> dict[str, Tensor]:
    """Of the sums [2]; nothing where there are no tokens, as of a set that the trainer's limit_val_batches leaves out."""
    if sums[1] == 0:
        return {}
    loss = sums[0] / sums[1]
    return {f"loss{suffix}": loss.float(), f"perplexity{suffix}": loss.exp().float()}


def in_turn(sets: Sequence[Iterable[T]]) -> Iterator[T]:
    """The first of each set, then the second of each, until all are through; no set is read further than that."""
    over = object()
    for row in zip_longest(*sets, fillvalue=over):
        yield from (one for one in row if one is not over)  # type: ignore[misc]


def set_names(sets: Sequence[RowSet]) -> list[str]:
    """What logs and reports call each set of a run: its name, with a number behind it where an earlier set has the same."""
    seen: Counter[str] = Counter()
    found = []
    for name in (one.spec.name for one in sets):
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def heldout_names(sets: Sequence[RowSet]) -> list[str]:
    """The names of the sets that have held-out rows."""
    return [name for name, one in zip(set_names(sets), sets, strict=True) if one.validation is not None]
