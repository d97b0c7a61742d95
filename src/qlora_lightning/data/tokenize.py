"""Conversations to token ids and labels. One rendering, tokenized once; labels come from its character spans.

Shapes: n tokens of an example, N tokens of the whole set, E examples.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qlora_lightning.data.formats import Conversation, Row, read_conversations
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.templates import Rendering, Template, check_template, render
from qlora_lightning.data.truncate import Cut, Ints, Mask, truncate
from qlora_lightning.errors import UserError

IGNORED = -100  # torch's ignore_index: no loss on this token
_BATCH = 1000  # conversations a call of the tokenizer: enough for its threads, little memory
_PROGRESS_FROM = 5000  # rows; fewer are done before a bar can be read


class Encoded(NamedTuple):
    """The tokens of one rendering: ids [n] and the characters that each covers, [start, end)."""

    ids: Ints
    starts: Ints
    ends: Ints
    respelled: bool
    """A message spelled a control token, so that the text between control tokens was tokenized piece by piece."""


class Encoder:
    """Tokenizes renderings so that only the template writes control tokens, and every token's place is known.

    It works on two copies of the tokenizer's backend, one of which splits control tokens like other text. Neither has a
    post-processor: that would trim blanks off the offsets, so that a token's place would no longer be where its text is.

    Raises:
        UserError: the tokenizer has no such backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"loss masks need a fast tokenizer with character offsets, got {type(tokenizer).__name__}; use another base model"
            )
        self._backend = _copy_backend(tokenizer)
        self._plain = _copy_backend(tokenizer)
        self._plain.encode_special_tokens = True
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
        written = {tokenizer.convert_tokens_to_ids(token) for token in template.control}
        self._control = np.array(sorted((special | written | {tokenizer.bos_token_id, tokenizer.eos_token_id}) - {None}), dtype=np.int32)

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded | None]:
        """The tokens of each rendering; None where a message spells a control token that this tokenizer cannot take apart."""
        encodings = self._backend.encode_batch([rendering.text for rendering in renderings], add_special_tokens=False)
        joined = (_encoded(encoding.ids, encoding.offsets) for encoding in encodings)
        return [tokens if self._agrees(tokens, r) else self._in_pieces(r) for tokens, r in zip(joined, renderings, strict=True)]

    def _agrees(self, tokens: Encoded, rendering: Rendering) -> bool:
        """Whether the control tokens are those that the template wrote, one for one. (Some take neighbouring blanks with them.)"""
        found = np.flatnonzero(np.isin(tokens.ids, self._control))
        written = np.array(rendering.control, dtype=np.int32).reshape(-1, 2)
        if len(found) != len(written):
            return False
        return bool(np.all(tokens.starts[found] <= written[:, 0]) and np.all(tokens.ends[found] >= written[:, 1]))

    def _in_pieces(self, rendering: Rendering) -> Encoded | None:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        position, text = 0, rendering.text
        for start, end in [*rendering.control, (len(text), len(text))]:
            piece = self._plain.encode(text[position:start], add_special_tokens=False)
            ids += piece.ids
            spans += [(position + first, position + last) for first, last in piece.offsets]
            if start < end:
                control = self._plain.token_to_id(text[start:end])
                assert control is not None  # check_template
                ids.append(control)
                spans.append((start, end))
            position = end
        tokens = _encoded(ids, spans, respelled=True)
        return tokens if self._agrees(tokens, rendering) else None


def _copy_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encoded(ids: list[int], offsets: list[tuple[int, int]], respelled: bool = False) -> Encoded:
    spans = np.array(offsets, dtype=np.int32).reshape(-1, 2)
    return Encoded(np.array(ids, dtype=np.int32), spans[:, 0], spans[:, 1], respelled)


def answer_mask(tokens: Encoded, spans: Sequence[tuple[int, int]]) -> tuple[Mask, int]:
    """Which tokens [n] belong to the spans, and how many tokens straddle a span's beginning.

    A token belongs to the span in which it starts. One that starts before it is not trained on: the prompt at inference ends at the span,
    so that the model could never write this token. No text token crosses a span's end, where a control token stands.
    """
    mask = np.zeros(len(tokens.ids), dtype=np.bool_)
    straddling = 0
    for start, end in spans:
        first, last = np.searchsorted(tokens.starts, (start, end))
        mask[first:last] = True
        straddling += bool(first > 0 and tokens.ends[first - 1] > start)
    return mask, straddling


class TokenizedExample(NamedTuple):
    """One example: input_ids [n] int32 and labels [n] int32, -100 where there is no loss. Views for ids, not to be written to."""

    input_ids: Ints
    labels: Ints


class TokenizedDataset:
    """All examples in three flat arrays: five bytes a token, so that 240,000 rows take some hundred megabytes and not gigabytes."""

    def __init__(self, examples: Sequence[Cut]) -> None:
        self.lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
        """Tokens of each example [E]."""
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._ids = np.concatenate([example.ids for example in examples])
        self._supervised = np.concatenate([example.answer for example in examples])
        counts = np.concatenate([[0], np.cumsum(self._supervised)])
        first = self._supervised[self._offsets[:-1]]
        self.targets = (counts[self._offsets[1:]] - counts[self._offsets[:-1]] - first).astype(np.int64)
        """Tokens of each example that are predicted [E]: supervised ones, less a first token, which nothing predicts."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        part = slice(self._offsets[index], self._offsets[index + 1])
        return TokenizedExample(self._ids[part], np.where(self._supervised[part], self._ids[part], IGNORED).astype(np.int32))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything a run can see of the set: ids, labels and borders."""
        digest = hashlib.sha256()
        for array in (self._offsets, self._ids, self._supervised):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass
class DataReport:
    """What became of the rows. Lengths and counts are in tokens unless the name says otherwise."""

    rows: int
    kept: int
    """Examples to train on; a tree row may give several."""
    skipped: dict[str, int]
    """Why a row or conversation was left out -> how many."""
    truncated: int
    """Examples that a length limit cut."""
    respelled: int
    """Examples in which a message spells a control token, kept as plain text."""
    straddling_tokens: int
    """Tokens that begin before an answer and end in it: not trained on."""
    tokens: int
    supervised_tokens: int
    """Predicted tokens that count in the loss."""
    length_min: int
    length_median: float
    length_p95: float
    length_max: int


@dataclass
class _Tally:
    skipped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    respelled: int = 0
    straddling: int = 0


def prepare(rows: Sequence[tuple[str, Row]], spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenizedDataset, DataReport]:
    """Tokenizes rows, each given with the place that errors name it by, into a data set and the account of what became of them.

    Raises:
        UserError: a row is wrong, the template does not suit the tokenizer, or no row is left.
    """
    template = check_template(spec.template, tokenizer)
    encoder = Encoder(tokenizer, template)
    bos = tokenizer.bos_token is not None and tokenizer.bos_token not in template.control
    tally, examples = _Tally(), []
    for batch in _batches(read_conversations(_shown(rows), spec, tally.skipped)):
        renderings = [render(conversation, template, tokenizer.bos_token, tokenizer.eos_token) for conversation in batch]
        for rendering, tokens in zip(renderings, encoder.encode(renderings), strict=True):
            example = _example(rendering, tokens, bos, spec, tally)
            if example is not None:
                examples.append(example)
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
        raise UserError(
            f"no row of the data set is left to use: {reasons}, of {len(rows)} rows; correct the rows or the limits in data.dataset"
        )
    dataset = TokenizedDataset(examples)
    return dataset, _report(len(rows), dataset, tally)


def _shown(rows: Sequence[tuple[str, Row]]) -> Iterable[tuple[str, Row]]:
    if len(rows) <= _PROGRESS_FROM:
        return rows
    return track(rows, description="Tokenizing", console=Console(stderr=True), transient=True)


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while batch := list(islice(conversations, _BATCH)):
        yield batch


def _example(rendering: Rendering, tokens: Encoded | None, bos: bool, spec: DatasetSpec, tally: _Tally) -> Cut | None:
    if tokens is None:
        tally.skipped["text spells a control token"] += 1
        return None
    answer, straddling = answer_mask(tokens, rendering.supervised)
    if not answer.any():
        tally.skipped["no supervised token"] += 1
        return None
    header = int(np.searchsorted(tokens.starts, rendering.header))
    example = truncate(Cut(tokens.ids, answer), header, bos, spec)
    if example is None:
        tally.skipped["longer than max_length"] += 1
        return None
    cut = len(example.ids) < len(tokens.ids)
    if not example.answer[1:].any():
        tally.skipped["no supervised token left after truncation" if cut else "no supervised token"] += 1
        return None
    tally.truncated += cut
    tally.respelled += tokens.respelled
    tally.straddling += straddling
    return _labelled(example, bos, spec.train_on_source)


def _labelled(example: Cut, bos: bool, train_on_source: bool) -> Cut:
    """Everything but BOS supervised, or the answers alone; what follows the last answer then has no part in any loss and goes."""
    if train_on_source:
        return Cut(example.ids, np.arange(len(example.ids)) >= int(bos))
    end = len(example.ids) - int(np.argmax(example.answer[::-1]))
    return Cut(example.ids[:end], example.answer[:end])


def _report(rows: int, dataset: TokenizedDataset, tally: _Tally) -> DataReport:
    lengths = dataset.lengths
    return DataReport(
        rows=rows,
        kept=len(dataset),
        skipped=dict(tally.skipped),
        truncated=tally.truncated,
        respelled=tally.respelled,
        straddling_tokens=tally.straddling,
        tokens=int(lengths.sum()),
        supervised_tokens=int(dataset.targets.sum()),
        length_min=int(lengths.min()),
        length_median=float(np.median(lengths)),
        length_p95=float(np.percentile(lengths, 95)),
        length_max=int(lengths.max()),
    )
