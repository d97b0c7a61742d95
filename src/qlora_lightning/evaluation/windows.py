"""Texts as tokens, and the windows in which a model of limited context sees them."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_lightning.evaluation.likelihood import Tokens
from qlora_lightning.modeling.sources import quiet_transformers


class Span(NamedTuple):
    """A window over the tokens of a text, of which the last ``scored`` are scored."""

    begin: int
    end: int
    scored: int


def strided(length: int, window: int, stride: int) -> Iterator[Span]:
    """The windows over a text of ``length`` tokens, at least two: all but its first token are scored, each in one window.

    These are the windows of transformers' guide "Perplexity of fixed-length models", but where the stride is the window: there the first
    token of each window has nothing before it and the guide loses it; here it sees the last token of the window before.
    """
    ends = [*range(min(window, length), length, stride), length]
    yield Span(0, ends[0], ends[0] - 1)
    for number, (before, end) in enumerate(pairwise(ends), 1):
        yield Span(min(number * stride, before - 1), end, end - before)


class Encoded(NamedTuple):
    ids: Tokens
    scored: str
    """The part of the text whose tokens are scored."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], limit: int | None) -> Iterator[Encoded]:
    """The texts as tokens, BOS before each where ``bos_of`` says so, until ``limit`` tokens are to be scored."""
    bos, left = bos_of(tokenizer), math.inf if limit is None else limit
    prefix = [] if bos is None else [bos]
    for text in texts:
        if left <= 0:
            return
        with quiet_transformers():  # it warns of texts longer than the model's context
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first = 0 if prefix else 1
        count = int(min(len(encoding.input_ids), first + left))
        places = encoding.offset_mapping[first:count]
        yield Encoded(np.array(prefix + encoding.input_ids[:count]), text[places[0][0] : places[-1][1]] if places else "")
        left -= len(places)


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS where the tokenizer puts it before what it encodes: then the model was trained to find it there."""
    first = tokenizer("a").input_ids[0]
    return int(first) if first == tokenizer.bos_token_id else None
