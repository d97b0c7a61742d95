"""The next token's logits behind many prompts that begin alike: their common beginning is computed once.

What the prompts share becomes keys and values that every row of a batch sees and no row keeps; the rows' own tokens follow, padded on
the right, and the head runs on each row's last token alone.

Shapes: B rows of a batch, T tokens of a row (padded), P shared tokens, H heads, D channels a head, W wanted tokens.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_SEEN = 16
"""How many times ``batch_tokens`` the keys of a batch may be, shared ones counted in every row: bounds what a layer's attention holds."""


class _SharedLayer(DynamicLayer):
    """A layer's keys and values of the shared tokens [1, H, P, D], given to every row and never grown."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, P + T, D] of shared and own tokens."""
        assert self.keys is not None and self.values is not None
        rows = key_states.shape[0]
        keys, values = self.keys.expand(rows, -1, -1, -1), self.values.expand(rows, -1, -1, -1)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def _shared_layer(layer: DynamicLayer) -> _SharedLayer:
    shared = _SharedLayer()
    assert layer.keys is not None and layer.values is not None
    shared.lazy_initialization(layer.keys, layer.values)
    shared.keys, shared.values = layer.keys, layer.values
    return shared


@dataclass(frozen=True)
class Reader:
    """Reads the logits of some tokens behind prompts. The model must be in eval mode; nothing of it changes.

    Attributes:
        model: A causal language model of transformers, PEFT's around one too.
        wanted: The tokens whose logits are asked for [W].
        filler: A token to fill rows with; any does.
        batch_tokens: Tokens of a batch at most, padding included (one row at least).
    """

    model: Any
    wanted: Sequence[int]
    filler: int
    batch_tokens: int = 4096

    def can_share(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether this model computes the same with a shared beginning as without, tried on two of ``prompts``, which begin alike."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if "past_key_values" not in inspect.signature(base.forward).parameters:
            return False
        pair = list(prompts[:2])
        shared = _common(pair)
        cache = self._cache(pair[0][:shared]) if shared else None
        if cache is None:
            return not shared
        whole = self._all_logits(pair, None)
        parts = self._all_logits([prompt[shared:] for prompt in pair], cache)
        # A model that ignores the cache, or carries more than keys, differs by more than rounding does.
        tolerance = 1e-3 if whole.dtype == torch.float32 else 5e-2
        spread = (whole.float() - whole.float().mean(1, keepdim=True)).abs().max()
        return bool((whole.float() - parts.float()).abs().max() <= tolerance * spread)

    def logits(self, prompts: Sequence[Sequence[int]], share: bool) -> Iterator[tuple[list[int], Tensor]]:
        """The wanted tokens' logits behind each prompt, batch by batch, longest first.

        Args:
            prompts: Token ids, none empty.
            share: Compute the common beginning of all ``prompts`` once.

        Yields:
            The numbers of the prompts of a batch [B], and their logits [B, W] in fp32 on the model's device.
        """
        shared = _common(prompts) if share and len(prompts) > 1 else 0
        cache = self._cache(prompts[0][:shared]) if shared else None
        rest = [prompt[shared:] for prompt in prompts]
        for numbers in self._batches([len(row) for row in rest], shared):
            yield numbers, self._all_logits([rest[number] for number in numbers], cache)[:, list(self.wanted)].float()

    def _batches(self, lengths: list[int], shared: int) -> Iterator[list[int]]:
        batch: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            longest, rows = lengths[batch[0]] if batch else 0, len(batch) + 1
            if batch and max(longest * rows, (shared + longest) * rows // _SEEN) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(number)
        yield batch

    def _cache(self, ids: Sequence[int]) -> Cache | None:
        """Keys and values of the shared tokens; None for a model that keeps anything else."""
        cache = DynamicCache()
        with _head_on(self.model, [0]):
            self.model(input_ids=self._tensor([ids]), past_key_values=cache, use_cache=True)
        if len(cache.layers) == 0 or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        return Cache(layers=[_shared_layer(layer) for layer in cache.layers])  # type: ignore[arg-type]

    def _all_logits(self, rows: Sequence[Sequence[int]], cache: Cache | None) -> Tensor:
        """Logits of the whole vocabulary behind each row."""
        with _head_on(self.model, [len(row) - 1 for row in rows]):
            output = self.model(input_ids=self._tensor(rows), past_key_values=cache, use_cache=cache is not None)
        logits: Tensor = output.logits[:, 0]
        return logits

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows padded on the right [B, T]: a causal model's tokens never see what follows, so that no mask is needed."""
        width = max(map(len, rows))
        padded = [[*row, *[self.filler] * (width - len(row))] for row in rows]
        return torch.tensor(padded, device=next(self.model.parameters()).device)


@contextmanager
def _head_on(model: Any, positions: list[int]) -> Iterator[None]:
    """Within this, the head of ``model`` runs on one position of each row only, and gives logits [B, 1, V]."""

    def pick(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = inputs
        rows = torch.arange(len(positions), device=hidden_BTD.device)
        return hidden_BTD[rows, torch.tensor(positions, device=hidden_BTD.device)].unsqueeze(1), *rest

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, at least one of each left over."""
    first, *others = prompts
    length = min(map(len, prompts)) - 1
    for other in others:
        length = next((n for n in range(length) if first[n] != other[n]), length)
    return length
