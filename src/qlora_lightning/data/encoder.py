"""Renderings to tokens whose place in the text is known. Only the template writes control tokens.

Shapes: n tokens of a rendering.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from qlora_lightning.data.rendering import ConversationRenderer, Rendering
from qlora_lightning.data.truncate import Ints, Mask
from qlora_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """The tokens of one rendering: ids [n] and the characters that each covers, [start, end)."""

    ids: Ints
    starts: Ints
    ends: Ints
    respelled: bool
    """A message spelled a control token, so that the text between control tokens was tokenized piece by piece."""


class _Part(NamedTuple):
    """A stretch of a rendering that is tokenized by itself."""

    text: str
    start: int
    """Where it begins in the rendering."""
    control: list[tuple[int, int]]
    """Control tokens of the template in it, in characters of ``text``."""
    follows: str
    """What stands before it, "nothing", "text" or "control": by that some tokenizers put a blank before the first word, or do not."""


class _Backends:
    """A tokenizer's backend that takes control tokens for what they are, and one that splits them like other text."""

    def __init__(self, json: str) -> None:
        self.whole, self.plain = _load_backend(json), _load_backend(json)
        self.plain.encode_special_tokens = True


class Encoder:
    """Tokenizes renderings so that only the template writes control tokens, and every token's place is known.

    A token never joins the end of a prompt and the beginning of its answer: at inference the prompt's tokens are fixed before the answer's
    first one is chosen. Where the tokenizer would join them, the text is cut there.

    It works on copies of the tokenizer's backend without a post-processor: that would trim blanks off the offsets, so that a token's place
    would no longer be where its text is.

    Args:
        backend: the tokenizer's backend as JSON.
        control: the ids that only a template may write.
        unknown: the id of the unknown token and how it is spelled, where the tokenizer has one that is not among ``control``.
    """

    def __init__(self, backend: str, control: Ints, unknown: tuple[int, str] | None = None) -> None:
        self._json, self._control, self._unknown = backend, control, unknown
        self._unchanged = _Backends(backend)
        self._behind = {"nothing": self._unchanged, "control": self._changed(_first_word_only), "text": self._changed(_no_word)}
        self._is_control = np.zeros(1 + max(self._unchanged.whole.get_vocab().values()), dtype=np.bool_)
        self._is_control[control] = True

    def _changed(self, change: Callable[[dict[str, Any]], None]) -> _Backends:
        """The backend with all settings changed about the blank before words; itself where there are none."""
        state = json.loads(self._json)
        _walk(state, change)
        return self._unchanged if state == json.loads(self._json) else _Backends(json.dumps(state))

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
        known = tokenizer.unk_token_id is None or tokenizer.unk_token_id in ids
        unknown = None if known else (tokenizer.unk_token_id, str(tokenizer.unk_token))
        return cls(tokenizer.backend_tokenizer.to_str(), np.array(sorted(ids), dtype=np.int32), unknown)

    def __reduce__(self) -> tuple[type["Encoder"], tuple[str, Ints, tuple[int, str] | None]]:
        return Encoder, (self._json, self._control, self._unknown)

    def is_control(self, ids: Ints) -> Mask:
        """Which of the tokens [n] only a template may write."""
        return self._is_control[ids]

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded | None]:
        """The tokens of each rendering; None where a message spells a control token that this tokenizer cannot take apart."""
        cuts = [_blank_borders(rendering) for rendering in renderings]
        encoded = self._encode(renderings, cuts)
        joined = [_joined_borders(tokens, rendering) for tokens, rendering in zip(encoded, renderings, strict=True)]
        again = [number for number, borders in enumerate(joined) if borders]
        parts = self._encode([renderings[number] for number in again], [cuts[number] | joined[number] for number in again])
        for number, tokens in zip(again, parts, strict=True):
            encoded[number] = tokens
        return encoded

    def _encode(self, renderings: Sequence[Rendering], cuts: Sequence[set[int]]) -> list[Encoded | None]:
        parts = [_parts(rendering, borders) for rendering, borders in zip(renderings, cuts, strict=True)]
        flat = [part for group in parts for part in group]
        found: dict[int, Encoding] = {}
        for follows, backends in self._behind.items():
            chosen = [number for number, part in enumerate(flat) if part.follows == follows]
            encodings = backends.whole.encode_batch([flat[number].text for number in chosen], add_special_tokens=False)
            found |= dict(zip(chosen, encodings, strict=True))
        numbers = iter(range(len(flat)))
        return [_whole([self._checked(found[next(numbers)], part) for part in group], group) for group in parts]

    def _checked(self, encoding: Encoding, part: _Part) -> Encoded | None:
        tokens = _encoded(encoding.ids, encoding.offsets, part.text)
        return tokens if self._agrees(tokens, part) else self._in_pieces(part)

    def _agrees(self, tokens: Encoded, part: _Part) -> bool:
        """Whether the control tokens are those that the template wrote, one for one. (Some take neighbouring blanks with them.)"""
        found = np.flatnonzero(self.is_control(tokens.ids))
        if len(found) != len(part.control) or self._spells_unknown(tokens, part):
            return False
        written = np.array(part.control, dtype=np.int32).reshape(-1, 2)
        return bool(np.all(tokens.starts[found] <= written[:, 0]) and np.all(tokens.ends[found] >= written[:, 1]))

    def _spells_unknown(self, tokens: Encoded, part: _Part) -> bool:
        """Whether the unknown token stands for its own name, and not for a character that the tokenizer does not know."""
        if self._unknown is None or self._unknown[1] not in part.text:
            return False
        places = np.flatnonzero(tokens.ids == self._unknown[0])
        return any(part.text[tokens.starts[n] : tokens.ends[n]].strip() == self._unknown[1] for n in places)

    def _in_pieces(self, part: _Part) -> Encoded | None:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        position, text = 0, part.text
        backends = self._behind[part.follows]
        for start, end in [*part.control, (len(text), len(text))]:
            piece = backends.plain.encode(text[position:start], add_special_tokens=False)
            ids += piece.ids
            spans += [(position + first, position + last) for first, last in piece.offsets]
            if start < end:
                control = backends.plain.token_to_id(text[start:end])
                assert control is not None  # load_renderer
                ids.append(control)
                spans.append((start, end))
            position, backends = end, self._behind["control"]
        tokens = _encoded(ids, spans, text, respelled=True)
        return tokens if self._agrees(tokens, part) else None


def _load_backend(json: str) -> Tokenizer:
    backend = Tokenizer.from_str(json)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _walk(node: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes every component of a backend."""
    if isinstance(node, dict):
        change(node)
        for name in ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers"):
            _walk(node.get(name), change)
    elif isinstance(node, list):
        for part in node:
            _walk(part, change)


def _first_word_only(component: dict[str, Any]) -> None:
    """Behind a control token: what a tokenizer does to a text's first word alone, it does not do there."""
    if component.get("prepend_scheme") == "first":
        component["prepend_scheme"] = "never"


def _no_word(component: dict[str, Any]) -> None:
    """Inside a text: no blank before it."""
    if "prepend_scheme" in component:
        component["prepend_scheme"] = "never"
    if "add_prefix_space" in component:
        component["add_prefix_space"] = False
    if component.get("type") == "Prepend":
        component["prepend"] = ""


def _blank_borders(rendering: Rendering) -> set[int]:
    """The answers behind two blanks or line ends: there many tokenizers look ahead, so that what follows changes the blanks' tokens."""
    text = rendering.text
    return {start for start, _ in rendering.supervised if start > 1 and text[start - 2 : start].isspace()}


def _joined_borders(tokens: Encoded | None, rendering: Rendering) -> set[int]:
    """The answers whose first token begins before them."""
    if tokens is None:
        return set()
    starts = [start for start, _ in rendering.supervised]
    before = np.searchsorted(tokens.starts, starts) - 1
    return {start for start, token in zip(starts, before, strict=True) if token >= 0 and tokens.ends[token] > start}


def _parts(rendering: Rendering, cuts: set[int]) -> list[_Part]:
    follows = {0: "nothing"}
    if rendering.joint is not None:  # as the authors' code did: both are texts of their own
        follows[rendering.joint] = "nothing"
    else:  # from a cut to the end of the answer, behind which all is as it would be without the cut
        follows |= dict.fromkeys((end for start, end in rendering.supervised if start in cuts), "control") | dict.fromkeys(cuts, "text")
    return [
        _Part(
            rendering.text[start:end],
            start,
            [(first - start, last - start) for first, last in rendering.control if start <= first and last <= end],
            follows[start],
        )
        for start, end in pairwise([*sorted(follows), len(rendering.text)])
        if start < end or not start
    ]


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


def _whole(encoded: list[Encoded | None], parts: list[_Part]) -> Encoded | None:
    found = [tokens for tokens in encoded if tokens is not None]
    if len(found) < len(parts):
        return None
    if len(parts) == 1:
        return found[0]
    return Encoded(
        np.concatenate([tokens.ids for tokens in found]),
        np.concatenate([tokens.starts + part.start for tokens, part in zip(found, parts, strict=True)]),
        np.concatenate([tokens.ends + part.start for tokens, part in zip(found, parts, strict=True)]),
        any(tokens.respelled for tokens in found),
    )


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
