"""The log-likelihoods that every measurement by likelihood rests on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lightning.evaluation import likelihood
from qlora_lightning.evaluation.likelihood import Scored, negative_log_likelihoods
from qlora_lightning.modeling.trained import TrainedModel, load_trained


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> TrainedModel:
    """The tiny model, not quantised, in fp32 whatever the processor prefers."""
    trained = load_trained(None, str(tiny_base), "16bit")
    trained.model.float()
    return replace(trained, dtype=torch.float32)


def sequence(length: int, scored: int, seed: int = 0) -> Scored:
    return Scored(np.random.default_rng(seed).integers(6, 250, length), scored)


def one_by_one(trained: TrainedModel, one: Scored) -> float:
    """The definition: the whole sequence through the model, log-softmax, the sum over the last tokens."""
    ids = torch.from_numpy(one.ids)[None]
    with torch.no_grad():
        log_probabilities = F.log_softmax(trained.model(input_ids=ids).logits[0, :-1].double(), -1)
    return -float(log_probabilities.gather(1, ids[0, 1:, None])[-one.scored :].sum())


SEQUENCES = [sequence(2, 1, 1), sequence(40, 39, 2), sequence(40, 5, 3), sequence(17, 16, 4), sequence(33, 1, 5)]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_sums_equal_the_definition_in_any_batch(tiny: TrainedModel, batch_size: int) -> None:
    """Lengths and numbers of scored tokens are mixed: neither padding nor order reaches a sum."""
    expected = [one_by_one(tiny, one) for one in SEQUENCES]
    assert negative_log_likelihoods(tiny, SEQUENCES, batch_size).tolist() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 30), st.floats(0, 1)), min_size=1, max_size=6), st.integers(1, 4))
def test_any_mix_of_lengths(tiny: TrainedModel, shapes: list[tuple[int, float]], batch_size: int) -> None:
    sequences = [sequence(length, 1 + int(share * (length - 2)), length) for length, share in shapes]
    expected = [one_by_one(tiny, one) for one in sequences]
    assert negative_log_likelihoods(tiny, sequences, batch_size).tolist() == pytest.approx(expected, rel=1e-5)


def test_pieces_change_nothing_and_bound_what_is_fp32(tiny: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = negative_log_likelihoods(tiny, SEQUENCES, 5), []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(likelihood, "PIECE", 7 * 512)
    monkeypatch.setattr(
        likelihood.F, "cross_entropy", lambda logits, *rest, **named: sizes.append(len(logits)) or cross_entropy(logits, *rest, **named)
    )
    assert negative_log_likelihoods(tiny, SEQUENCES, 5).tolist() == pytest.approx(whole.tolist(), rel=1e-6)
    assert max(sizes) == 7 and len(sizes) > 1


def test_logits_are_kept_only_where_something_is_scored(tiny: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, forward = [], tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda **inputs: kept.append(inputs["logits_to_keep"]) or forward(**inputs))
    negative_log_likelihoods(tiny, [sequence(40, 5), sequence(38, 5)], 2)
    assert kept == [7]  # the shorter row's places lie two before the longer one's


def test_the_work_that_is_done_is_told(tiny: TrainedModel) -> None:
    told: list[int] = []
    negative_log_likelihoods(tiny, SEQUENCES, 2, told.append)
    assert sum(told) == sum(one.scored for one in SEQUENCES) and len(told) == 3


def test_no_state_of_the_model_changes(tiny: TrainedModel) -> None:
    before = torch.get_rng_state()
    negative_log_likelihoods(tiny, SEQUENCES, 2)
    assert torch.equal(before, torch.get_rng_state()) and not tiny.model.training
