"""Answers from a model with an adapter: batched, left-padded, stopped at the end of turn."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qlora_lightning.answer_file import Answer
from qlora_lightning.console import say
from qlora_lightning.data.encoder import Encoder, encode_prompts
from qlora_lightning.data.formats import Conversation
from qlora_lightning.data.rendering import Renderer, load_renderer
from qlora_lightning.data.templates import find_template
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.tokenizer import filler_id
from qlora_lightning.modeling.trained import load_trained
from qlora_lightning.sampling import samplers


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
    """Seed of the sampling. An answer depends on it, on its prompt and on the prompt's number in the file, on no other answer."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.seed < 0:
            raise UserError(
                "need max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and seed >= 0, "
                f"got {self.max_new_tokens}, {self.temperature:g}, {self.top_p:g} and {self.seed}; correct them"
            )


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
        return [answer.generation for answer in self.complete(*self.encode(conversations), spec)]

    def answer_all(
        self, conversations: Mapping[int, Conversation], spec: GenerationSpec, batch_size: int, left: Collection[int] | None = None
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Answers to numbered conversations, batch by batch; conversations of like length together, the longest first.

        Answers depend on the batches only by the rounding of the arithmetic, which in bf16 now and then turns a word. Batches are the same
        whatever is ``left``, so that a run that goes on ends with the answers of one that was never interrupted, to the bit.

        Args:
            conversations: By the number that their random numbers depend on.
            spec: How answers are drawn.
            batch_size: Conversations answered at once.
            left: Numbers of those to answer; by default all.

        Raises:
            UserError: a message spells a control token that the tokenizer cannot write as text.
        """
        prompts = dict(zip(conversations, self.tokens(list(conversations.values())), strict=True))
        self._check_room(prompts.values(), spec)
        order = sorted(prompts, key=lambda number: -len(prompts[number]))
        wanted = set(prompts if left is None else left)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            if wanted.isdisjoint(numbers):
                continue
            ids, mask = left_pad([prompts[number] for number in numbers], filler_id(self.tokenizer))
            answers = zip(numbers, self.complete(ids, mask, spec, numbers), strict=True)
            yield [(number, answer) for number, answer in answers if number in wanted]

    def _check_room(self, prompts: Collection[Sequence[int]], spec: GenerationSpec) -> None:
        """Say where answers may run beyond the positions that the model was trained for (where its configuration knows them)."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        beyond = sum(len(prompt) + spec.max_new_tokens > positions for prompt in prompts) if positions else 0
        if beyond:
            say(f"warning: {beyond} of {len(prompts)} prompts + {spec.max_new_tokens} new tokens pass the model's {positions:,} positions")

    @cached_property
    def _encoder(self) -> Encoder:
        """Made once: it copies the tokenizer's backend, which takes longer than to encode a prompt."""
        return Encoder.of(self.tokenizer, self.renderer)

    @cached_property
    def _stop(self) -> list[int]:
        """The tokens that end a turn."""
        return [int(i) for i in self.tokenizer.convert_tokens_to_ids(self.renderer.end_tokens)]  # type: ignore[union-attr]

    def tokens(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The token ids of what asks for each conversation's answer.

        Raises:
            UserError: a message spells a control token that the tokenizer cannot write as text.
        """
        renderings = [self.renderer.prompt(conversation) for conversation in conversations]
        return [ids.tolist() for ids in encode_prompts(self._encoder, renderings)]

    def encode(self, conversations: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask, both [B, T]; errors as in ``tokens``."""
        return left_pad(self.tokens(conversations), filler_id(self.tokenizer))

    def complete(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        spec: GenerationSpec,
        numbers: Sequence[int] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[Answer]:
        """Answers to left-padded prompts.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 0 where a row is padding.
            spec: How answers are drawn. The global random state is not used.
            numbers: What tells the rows' random numbers apart, with the seed; by default 0 to B - 1.
            streamer: Receives the tokens of a single row as they come.
        """
        device = next(self.model.parameters()).device
        width, was_training = input_ids.shape[1], self.model.training
        numbers = range(len(input_ids)) if numbers is None else numbers
        drawing = samplers(spec.temperature, spec.top_p, spec.seed, numbers, width, spec.max_new_tokens) if spec.temperature > 0 else None
        self.model.eval()
        with torch.no_grad(), torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self._config(spec),
                logits_processor=drawing,
                streamer=streamer,
            )
        self.model.train(was_training)
        return [self._answer(row) for row in tokens[:, width:].tolist()]

    def _config(self, spec: GenerationSpec) -> GenerationConfig:
        """Greedy, as ``samplers`` leaves one token to choose from.

        Everything is said: transformers fills what is left out from the base model's own settings, and greedy would not be greedy.
        """
        return GenerationConfig(
            max_new_tokens=spec.max_new_tokens,
            eos_token_id=self._stop,
            pad_token_id=filler_id(self.tokenizer),
            use_cache=True,
            do_sample=False,
            repetition_penalty=1.0,
            num_beams=1,
        )

    def _answer(self, ids: list[int]) -> Answer:
        """Text up to the end of turn. Cut by id: after it a row holds only filler."""
        end = next((index for index, token in enumerate(ids) if token in self._stop), None)
        text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
        return Answer(text, len(ids), "length") if end is None else Answer(text, end + 1, "stop")


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
    if template:
        find_template(template)  # a misspelt one shows before the model is loaded
    loaded = load_trained(adapter, base_model, storage)
    style = load_renderer(template or loaded.metadata.get("template", "chatml"), loaded.tokenizer)
    return Assistant(loaded.model, loaded.tokenizer, style, loaded.dtype), loaded.metadata
