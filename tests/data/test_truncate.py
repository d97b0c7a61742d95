"""Length limits, on tokens written as letters: b = BOS, p = prompt, h = the words before an answer, A = answer, E = its end token."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.truncate import Cut, truncate

LIMITS = ("source_max_length", "target_max_length", "max_length", "truncation")


def cut(spec: DatasetSpec, tokens: str) -> str | None:
    """What is left; capitals are the assistant's. A letter in two cases would hide a wrong mask, so that it is checked here."""
    ids = np.array([ord(letter) for letter in tokens], dtype=np.int32)
    answer = np.array([letter.isupper() for letter in tokens])
    result = truncate(Cut(ids, answer), tokens.index("h"), tokens.startswith("b"), spec)
    if result is None:
        return None
    left = "".join(map(chr, result.ids))
    assert [letter.isupper() for letter in left] == result.answer.tolist()
    return left


@pytest.mark.parametrize(
    ("limits", "before", "after"),
    [
        # max_length
        ((None, None, 9, "drop"), "bppphhAAE", "bppphhAAE"),
        ((None, None, 8, "drop"), "bppphhAAE", None),
        ((None, None, 8, "right"), "bppphhAAE", "bppphhAE"),
        ((None, None, 7, "right"), "bppphhAAE", "bppphh"),  # an end token alone is no answer
        ((None, None, 6, "right"), "bppphhAAE", "bppphh"),
        ((None, None, 8, "left"), "bppphhAAE", "bpphhAAE"),
        ((None, None, 8, "left"), "ppphhAAAE", "pphhAAAE"),
        ((None, None, 3, "left"), "bppphhAAE", "bAE"),
        ((None, None, 1, "left"), "bphAE", "b"),
        # the cut falls into the second turn
        ((None, None, 9, "right"), "bphAEphAAAE", "bphAEphAE"),
        ((None, None, 6, "right"), "bphAEphAAAE", "bphAEp"),
        ((None, None, 5, "right"), "bphAEphAAAE", "bphAE"),
        # the paper's limits
        ((4, None, None, "drop"), "bppphhAAE", "bphhAAE"),
        ((9, None, None, "drop"), "bppphhAAE", "bppphhAAE"),
        ((1, None, None, "drop"), "bppphhAAE", "bhhAAE"),
        ((None, 2, None, "drop"), "bppphhAAAE", "bppphhAE"),
        ((None, 4, None, "drop"), "bppphhAAAE", "bppphhAAAE"),
        ((4, 2, None, "drop"), "bppphhAAAE", "bphhAE"),
        ((None, 4, None, "drop"), "bphAEphAAAE", "bphAEph"),
        ((None, 6, None, "drop"), "bphAEphAAAE", "bphAEphAE"),
        # both kinds: the prompt and answer first, then the whole
        ((4, 2, 5, "right"), "bppphhAAAE", "bphh"),
        ((3, 9, 6, "left"), "bppphhAAAE", "bhAAAE"),
    ],
)
def test_limits(
    make_spec: Callable[..., DatasetSpec], limits: tuple[int | None, int | None, int | None, str], before: str, after: str | None
) -> None:
    assert cut(make_spec(**dict(zip(LIMITS, limits, strict=True))), before) == after


@pytest.mark.parametrize(
    ("limits", "before", "after"),
    [
        ((None, None, None, "drop"), "bppphAAE", "bppphAAE"),
        ((3, None, None, "drop"), "bppphAAE", "bppAAE"),
        ((1, None, None, "drop"), "bppphAAE", "bAAE"),
        ((None, 2, None, "drop"), "bppphAAE", "bppphAA"),
        ((None, 3, None, "drop"), "bppphAAE", "bppphAAE"),
        ((2, 1, None, "drop"), "bppphAAE", "bpA"),
        ((1, 2, None, "drop"), "hAAE", "hAA"),
        ((99, 99, 4, "drop"), "bppphAAE", "bppphAAE"),  # the authors' code has no limit of the whole
    ],
)
def test_limits_of_the_paper_cut_both_sides_at_the_right(
    make_spec: Callable[..., DatasetSpec], limits: tuple[int | None, int | None, int | None, str], before: str, after: str
) -> None:
    """Neither the words before the answer nor its end token is kept."""
    assert cut(make_spec(compat="paper", **dict(zip(LIMITS, limits, strict=True))), before) == after


@pytest.mark.parametrize("truncation", ["left", "right"])
@pytest.mark.parametrize("limit", range(1, 12))
def test_no_limit_loses_the_end_of_an_answer_that_stays(make_spec: Callable[..., DatasetSpec], truncation: str, limit: int) -> None:
    left = cut(make_spec(max_length=limit, truncation=truncation), "bphAEphAAAE")
    assert left is not None
    assert len(left) <= limit
    assert not re.search("A(?![AE])", left)
