"""Renderings to tokens whose place in the text is known. Only the template writes control tokens.

Shapes: n tokens of a rendering.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from qlora_lightning.data.rendering import ConversationRenderer, Rendering
from qlora_lightning.data.truncate import Ints, Mask
from qlora_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PREPENDING = '"prepend_scheme":"first"'  # in a backend's JSON


class Encoded(NamedTuple):
    """The tokens of one rendering: ids [n] and the characters that each covers, [start, end)."""

    ids: Ints
    starts: Ints
    ends: Ints
    respelled: bool
    """A message spelled a control token, so that the text between control tokens was tokenized piece by piece."""


class _Part(NamedTuple):
    """A stretch of a rendering that is tokenized by itself; spans in characters of ``text``."""

    text: str
    control: list[tuple[int, int]]


class Encoder:
    """Tokenizes renderings so that only the template writes control tokens, and every token's place is known.

    It works on copies of the tokenizer's backend: one as it is, one that splits control tokens like other text, and where the tokenizer
    writes a blank before a text's first word, one that does so without it, for pieces from inside a text. None has a post-processor: that
    would trim blanks off the offsets, so that a token's place would no longer be where its text is.

    Args:
        backend: the tokenizer's backend as JSON.
        control: the ids that only a template may write.
    """

    def __init__(self, backend: str, control: Ints) -> None:
        self._json, self._control = backend, control
        self._backend, self._plain = _load_backend(backend), _load_backend(backend)
        self._is_control = np.zeros(1 + max(self._backend.get_vocab().values()), dtype=np.bool_)
        self._is_control[control] = True
        self._plain.encode_special_tokens = True
        self._inner = self._plain
        if _PREPENDING in backend:
            self._inner = _load_backend(backend.replace(_PREPENDING, '"prepend_scheme":"never"'))
            self._inner.encode_special_tokens = True

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", renderer: ConversationRenderer) -> "Encoder":
        """The encoder for renderings of ``renderer``.

        Raises:
            UserError: the tokenizer has no backend that gives character offsets.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"loss masks need a fast tokenizer with character offsets, got {type(tokenizer).__name__}; use another base model"
            )
        ids = {tokenizer.convert_tokens_to_ids(token) for token in renderer.control} - {None}
        return cls(tokenizer.backend_tokenizer.to_str(), np.array(sorted(ids), dtype=np.int32))

    def __reduce__(self) -> tuple[type["Encoder"], tuple[str, Ints]]:
        return Encoder, (self._json, self._control)

    def is_control(self, ids: Ints) -> Mask:
        """Which of the tokens [n] only a template may write."""
        return self._is_control[ids]

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded | None]:
        """The tokens of each rendering; None where a message spells a control token that this tokenizer cannot take apart."""
        parts = [_parts(rendering) for rendering in renderings]
        encodings = iter(self._backend.encode_batch([part.text for pair in parts for part in pair], add_special_tokens=False))
        return [_joined([self._checked(next(encodings), part) for part in pair], pair) for pair in parts]

    def _checked(self, encoding: Encoding, part: _Part) -> Encoded | None:
        tokens = _encoded(encoding.ids, encoding.offsets, part.text)
        return tokens if self._agrees(tokens, part) else self._in_pieces(part)

    def _agrees(self, tokens: Encoded, part: _Part) -> bool:
        """Whether the control tokens are those that the template wrote, one for one. (Some take neighbouring blanks with them.)"""
        found = np.flatnonzero(self.is_control(tokens.ids))
        if len(found) != len(part.control):
            return False
        written = np.array(part.control, dtype=np.int32).reshape(-1, 2)
        return bool(np.all(tokens.starts[found] <= written[:, 0]) and np.all(tokens.ends[found] >= written[:, 1]))

    def _in_pieces(self, part: _Part) -> Encoded | None:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        position, text = 0, part.text
        for start, end in [*part.control, (len(text), len(text))]:
            piece = (self._inner if position else self._plain).encode(text[position:start], add_special_tokens=False)
            ids += piece.ids
            spans += [(position + first, position + last) for first, last in piece.offsets]
            if start < end:
                control = self._plain.token_to_id(text[start:end])
                assert control is not None  # load_renderer
                ids.append(control)
                spans.append((start, end))
            position = end
        tokens = _encoded(ids, spans, text, respelled=True)
        return tokens if self._agrees(tokens, part) else None


def _load_backend(json: str) -> Tokenizer:
    backend = Tokenizer.from_str(json)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _parts(rendering: Rendering) -> list[_Part]:
    joint = rendering.joint
    if joint is None:
        return [_Part(rendering.text, rendering.control)]
    before = [span for span in rendering.control if span[1] <= joint]
    behind = [(start - joint, end - joint) for start, end in rendering.control[len(before) :]]
    return [_Part(rendering.text[:joint], before), _Part(rendering.text[joint:], behind)]


def _encoded(ids: list[int], offsets: list[tuple[int, int]], text: str, respelled: bool = False) -> Encoded:
    spans = np.array(offsets, dtype=np.int32).reshape(-1, 2)
    _part_bytes(spans, text)
    return Encoded(np.array(ids, dtype=np.int32), spans[:, 0], spans[:, 1], respelled)


def _part_bytes(spans: Ints, text: str) -> None:
    """Gives each byte token its own character in ``spans`` [n, 2]: a Unigram model gives all of them the whole run of unknown ones."""
    shared = np.all(spans[1:] == spans[:-1], axis=1) & (spans[1:, 1] - spans[1:, 0] > 1)
    if not shared.any():
        return
    borders = np.flatnonzero(np.diff(np.concatenate([[0], shared.astype(np.int8), [0]])))
    for first, last in borders.reshape(-1, 2):
        start, end = spans[first]
        characters = [n for n, character in enumerate(text[start:end], start) for _ in character.encode()]
        if len(characters) == last + 1 - first:
            spans[first : last + 1, 0] = characters
            spans[first : last + 1, 1] = spans[first : last + 1, 0] + 1


def _joined(encoded: list[Encoded | None], parts: list[_Part]) -> Encoded | None:
    whole = [tokens for tokens in encoded if tokens is not None]
    if len(whole) < len(parts):
        return None
    if len(parts) == 1:
        return whole[0]
    first, second = whole
    joint = len(parts[0].text)
    ids, starts = np.concatenate([first.ids, second.ids]), np.concatenate([first.starts, second.starts + joint])
    return Encoded(ids, starts, np.concatenate([first.ends, second.ends + joint]), first.respelled or second.respelled)


def encode_prompts(encoder: Encoder, prompts: Sequence[Rendering]) -> list[Ints]:
    """The token ids of prompts for inference.

    Raises:
        UserError: a message spells a control token that the tokenizer cannot write as text.
    """
    encoded = []
    for rendering, tokens in zip(prompts, encoder.encode(prompts), strict=True):
        if tokens is None:
            raise UserError(f"a prompt spells a control token of the tokenizer, which cannot be kept as text: {rendering.text[:80]!r}")
        encoded.append(tokens.ids)
    return encoded
