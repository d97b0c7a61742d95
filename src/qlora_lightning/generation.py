"""Answers from a model with an adapter: batched, left-padded, stopped at the end of turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qlora_lightning.data.encoder import Encoder, encode_prompts
from qlora_lightning.data.formats import Conversation
from qlora_lightning.data.rendering import Renderer, load_renderer
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.tokenizer import filler_id
from qlora_lightning.modeling.trained import load_trained


@dataclass
class GenerationSpec:
    """How answers are drawn."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; the QLoRA paper samples at 0.7."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that together have this probability (only where temperature is above 0)."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"need max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got {self}")


@dataclass
class Assistant:
    """A model that answers conversations in the template it was trained with."""

    model: Any
    """A causal language model of transformers or PEFT, in 4 bits or not."""
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    dtype: torch.dtype
    """The dtype that matrix products are computed in."""

    def answer(self, conversations: Sequence[Conversation], spec: GenerationSpec) -> list[str]:
        """Answers to a batch of conversations that end with a user's message (or whose last answer is to be given anew)."""
        return self.complete(*self.encode(conversations), spec)

    @cached_property
    def _encoder(self) -> Encoder:
        """Made once: it copies the tokenizer's backend, which takes longer than to encode a prompt."""
        return Encoder.of(self.tokenizer, self.renderer)

    def encode(self, conversations: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask, both [B, T].

        Raises:
            UserError: a message spells a control token that the tokenizer cannot write as text.
        """
        renderings = [self.renderer.prompt(conversation) for conversation in conversations]
        prompts = [ids.tolist() for ids in encode_prompts(self._encoder, renderings)]
        return left_pad(prompts, filler_id(self.tokenizer))

    def complete(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, spec: GenerationSpec, streamer: BaseStreamer | None = None
    ) -> list[str]:
        """Answers to left-padded prompts.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 0 where a row is padding.
            spec: How answers are drawn. The global random state is left as it was.
            streamer: Receives the tokens of a single row as they come.
        """
        device = next(self.model.parameters()).device
        # Everything is said: transformers fills what is left out from the base model's own settings, and greedy would not be greedy.
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1}
        if spec.temperature > 0:
            sampling |= {"do_sample": True, "temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
        stop = [int(i) for i in self.tokenizer.convert_tokens_to_ids(self.renderer.end_tokens)]  # type: ignore[union-attr]
        config = GenerationConfig(
            max_new_tokens=spec.max_new_tokens, eos_token_id=stop, pad_token_id=filler_id(self.tokenizer), use_cache=True, **sampling
        )
        was_training = self.model.training
        self.model.eval()
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            torch.manual_seed(spec.seed)
            tokens = self.model.generate(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config, streamer=streamer
            )
        self.model.train(was_training)
        return [self._text(row, stop) for row in tokens[:, input_ids.shape[1] :].tolist()]

    def _text(self, ids: list[int], stop: list[int]) -> str:
        """Text up to the end of turn. Cut by id: after it a row holds only filler."""
        end = next((index for index, token in enumerate(ids) if token in stop), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def left_pad(prompts: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of equal length that end together, and their mask: both [B, T] int64."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), filler)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def load_assistant(
    adapter: Path | None, base_model: str | None, template: str | None, storage: Storage | None = None
) -> tuple[Assistant, dict[str, Any]]:
    """Load a model that answers, as ``load_trained`` does.

    Args:
        adapter: A PEFT adapter folder; None for the base alone.
        base_model: The base; by default the one that the adapter names.
        template: Prompt template; by default the one that the adapter was trained with.
        storage: How to hold the base; by default as the adapter was trained, without one nf4-dq.

    Returns:
        The assistant, and the adapter's metadata ({} without one).

    Raises:
        UserError: no base is known, or the adapter belongs to another one.
    """
    loaded = load_trained(adapter, base_model, storage)
    style = load_renderer(template or loaded.metadata.get("template", "chatml"), loaded.tokenizer)
    return Assistant(loaded.model, loaded.tokenizer, style, loaded.dtype), loaded.metadata
