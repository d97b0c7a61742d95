"""Length limits on tokenized examples. No cut ever loses an answer's end token: a model trained without it never stops.
(``compat: paper`` does, as the authors' code did.)

Shapes: n tokens of an example.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_lightning.data.spec import DatasetSpec

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Cut(NamedTuple):
    """The tokens of an example while it is being cut: ids [n] and which of them are the assistant's [n]."""

    ids: Ints
    answer: Mask


def truncate(example: Cut, header: int, keep_first: bool, spec: DatasetSpec) -> Cut | None:
    """Applies the specification's limits, the prompt's first. None: too long, and to be dropped.

    Args:
        example: must hold an answer.
        header: index of the first token of the words that end the first question and open its answer.
        keep_first: the first token is BOS.
        spec: the limits.
    """
    if spec.compat == "paper":
        return _cut_as_paper(example, spec.source_max_length, spec.target_max_length)
    if spec.source_max_length is not None:
        example = _cut_source(example, header, spec.source_max_length, keep_first)
    if spec.target_max_length is not None:
        example = _cut_right(example, int(np.argmax(example.answer)) + spec.target_max_length)
    if spec.max_length is None or len(example.ids) <= spec.max_length:
        return example
    if spec.truncation == "right":
        return _cut_right(example, spec.max_length)
    return _cut_left(example, spec.max_length, keep_first) if spec.truncation == "left" else None


def _take(example: Cut, *parts: slice) -> Cut:
    return Cut(*(np.concatenate([values[part] for part in parts]) for values in example))


def _cut_as_paper(example: Cut, source_limit: int | None, target_limit: int | None) -> Cut:
    """The first tokens of source and target each, the end token lost where the target is longer (artidoro/qlora, the collator)."""
    source = int(np.argmax(example.answer))
    end = len(example.ids) if target_limit is None else source + target_limit
    return _take(example, slice(source if source_limit is None else min(source, source_limit)), slice(source, end))


def _cut_source(example: Cut, header: int, limit: int, keep_first: bool) -> Cut:
    """Cuts the end of the question's text but not the words behind it, without which the answer would answer nothing."""
    source = int(np.argmax(example.answer))
    if source <= limit:
        return example
    return _take(example, slice(max(limit - (source - header), int(keep_first))), slice(header, None))


def _cut_left(example: Cut, limit: int, keep_first: bool) -> Cut:
    first = min(int(keep_first), limit)
    return _take(example, slice(first), slice(len(example.ids) - (limit - first), None))


def _cut_right(example: Cut, limit: int) -> Cut:
    """The first ``limit`` tokens. Where that cuts an answer, its end token takes the last place; an end token alone is no answer."""
    if len(example.ids) <= limit:
        return example
    ids, answer = example.ids[:limit].copy(), example.answer[:limit]
    if not (answer[-1] and example.answer[limit]):
        return Cut(ids, answer)
    if limit < 2 or not answer[-2]:
        return Cut(ids[:-1], answer[:-1])
    rest = example.answer[limit:]
    end = limit + (len(rest) if rest.all() else int(np.argmin(rest))) - 1
    ids[-1] = example.ids[end]
    return Cut(ids, answer)
