"""Sampling that gives each row of a batch its own stream of random numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


def samplers(temperature: float, top_p: float, seed: int, numbers: Sequence[int], prompt_width: int, steps: int) -> LogitsProcessorList:
    """What turns greedy decoding into sampling, for ``generate(logits_processor=…)`` with ``do_sample=False``.

    Args:
        temperature: Above 0.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: With a row's number, all that its random numbers depend on.
        numbers: The number of each row's prompt [B].
        prompt_width: Tokens of the padded prompts.
        steps: Most tokens that will be drawn.
    """
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    warpers.append(DrawByRow(uniforms(seed, numbers, steps), prompt_width))
    return warpers


def uniforms(seed: int, numbers: Sequence[int], steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp32 [B, steps]: a row's depend on ``seed`` and its number alone."""
    return torch.from_numpy(np.stack([np.random.default_rng((seed, number)).random(steps, dtype=np.float32) for number in numbers]))


class DrawByRow(LogitsProcessor):
    """Draws each row's token by its own uniform number (inversion) and leaves that token alone, so that the argmax is the draw.

    transformers' own sampling draws all rows from one generator: an answer would change with the size and the order of batches. The numbers
    are made beforehand, so that no step waits for the device or loops over rows.

    Args:
        uniforms: [B, steps], in [0, 1).
        prompt_width: Tokens before the first that is drawn.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_width: int) -> None:
        self._uniforms, self._prompt_width = uniforms, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of which only the drawn token's is finite; ``scores`` are logits, -inf for what may not be drawn."""
        self._uniforms = self._uniforms.to(scores.device)
        drawn = self._uniforms[:, input_ids.shape[1] - self._prompt_width]
        # Double: a sum over a vocabulary in fp32 would be off by more than a rare token's probability. A uniform number has 24 bits, so
        # that times the total it stays below it; the first token whose sum exceeds it has a probability above 0.
        cumulated = scores.double().softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(cumulated, drawn[:, None].double() * cumulated[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)
