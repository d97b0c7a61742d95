"""KL, agreement and perplexity against float64 by hand; intervals that hold what they promise."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.intervals import Estimate
from qlora_lightning.export import evidence
from qlora_lightning.export.evidence import Figures, LiveRecord, Measured, Row, figures, in_batches, interval, scored_tokens
from qlora_lightning.export.verdict import Verdict, check, judge

Models = tuple[LlamaForCausalLM, LlamaForCausalLM]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tiny_base: Path) -> Models:
    """The tiny model in fp32, and the same with a little noise in its head and blocks."""
    one, other = (AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval() for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return one, other


def some_rows(count: int = 5) -> list[Row]:
    drawn = np.random.default_rng(0)
    lengths = drawn.integers(2, 60, count)
    return [Row(drawn.integers(6, 262, n), drawn.random(n - 1) < 0.7) for n in lengths]


def test_figures_are_those_of_float64_by_hand(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "PIECE", 512 * 7)  # several pieces a batch
    live, merged = models
    rows = some_rows()
    record, done = LiveRecord(tmp_path / "live", rows, 512), []
    alone = record.record(live, nullcontext, CPU, done.append)
    found = record.compare(merged, nullcontext, CPU, lambda tokens: None)
    assert sum(done) == scored_tokens(rows) == len(found.kl)
    kl, agrees, loss = [], [], []
    for row in rows:
        ids = torch.from_numpy(row.ids)[None]
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].double().log_softmax(-1)[torch.from_numpy(row.scored)] for model in (live, merged))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agrees += (p.argmax(-1) == q.argmax(-1)).tolist()
        loss += (-q[torch.arange(len(q)), ids[0, 1:][torch.from_numpy(row.scored)]]).tolist()
    assert sum(found.kl) == pytest.approx(sum(kl), rel=1e-4) and min(kl) > 0
    assert sum(found.agrees) == sum(agrees) and 0 < sum(agrees) < len(agrees)
    assert figures(found).perplexity.value == pytest.approx(np.exp(np.mean(loss)), rel=1e-5)
    assert figures(alone).kl.value == 0 and figures(alone).top1.value == 1


def test_a_model_is_at_no_distance_from_itself(models: Models, tmp_path: Path) -> None:
    record = LiveRecord(tmp_path / "live", some_rows(), 512)
    record.record(models[0], nullcontext, CPU, lambda tokens: None)
    found = figures(record.compare(models[0], nullcontext, CPU, lambda tokens: None))
    assert 0 <= found.kl.value < 1e-12 and found.top1.value == 1


def test_each_row_is_in_one_batch_and_batches_are_bounded() -> None:
    rows = [Row(np.zeros(n, np.int64), np.ones(n - 1, bool)) for n in (700, 3000, 5, 900, 600, 2)]
    batches = list(in_batches(rows))
    assert batches[0] == [1] and sorted(number for batch in batches for number in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(len(rows[n].ids) for n in batch) <= evidence.BATCH_TOKENS for batch in batches)


def test_interval_counts_rows_not_tokens() -> None:
    """Tokens of a row that are all alike say no more than one: ten times as many of them make the interval no narrower."""
    drawn = np.random.default_rng(3)
    means = drawn.normal(0.05, 0.01, 40)
    few, many = (interval(np.repeat(means, n), np.repeat(np.arange(40), n)) for n in (5, 50))
    assert few == pytest.approx(many)
    half = 1.96 * means.std() / np.sqrt(40)
    assert few.high - few.value == pytest.approx(half, rel=0.15) and few.value - few.low == pytest.approx(half, rel=0.15)


def test_all_tokens_alike_leave_a_doubt() -> None:
    measured = Measured(np.ones(100), np.zeros(100), np.ones(100), np.repeat(np.arange(10), 10))
    assert figures(measured).top1.value == 1 and 0.95 < figures(measured).top1.low < 0.97


# ---- the verdict ----


def measured(kl: float, nll: float = 1.0) -> Measured:
    return Measured(np.full(20, nll), np.full(20, kl), np.ones(20), np.repeat(np.arange(4), 5))


def test_the_nearer_one_is_taken_unless_the_user_chooses() -> None:
    both = {"original": measured(0.08), "dequantized": measured(0.0002)}
    assert judge(measured(0), both, None, 0.02).chosen == "dequantized"
    assert judge(measured(0), {"original": measured(0.001), "dequantized": measured(0.002)}, None, 0.02).chosen == "original"
    chosen = judge(measured(0), both, "original", 0.1)
    assert chosen.chosen == "original" and chosen.reason == "asked for" and chosen.good


@pytest.mark.parametrize("kl", [0.021, float("nan"), float("inf")])
def test_too_far_from_the_live_model_is_refused(kl: float) -> None:
    verdict = judge(measured(0), {"original": measured(kl)}, None, 0.02)
    with pytest.raises(
        UserError, match=r"within --max_kl 0.02 nats a token of the live one, got .* with original weights; nothing is written"
    ):
        check(verdict)


def test_a_refusal_names_the_better_one() -> None:
    verdict = judge(measured(0), {"original": measured(0.08), "dequantized": measured(0.0002)}, "original", 0.02)
    with pytest.raises(UserError, match=r"got 0.08 with original weights; .*; take --base dequantized \(which has 0.0002\), or --force"):
        check(verdict)


def test_nan_is_never_the_nearer_one() -> None:
    assert judge(measured(0), {"original": measured(float("nan")), "dequantized": measured(5.0)}, None, 0.02).chosen == "dequantized"


def test_the_bound_is_kept_exactly() -> None:
    nothing = Estimate(0, 0, 0)
    verdict = Verdict({"original": Figures(Estimate(0.02, 0, 1), nothing, nothing, 0.0)}, nothing, "original", False, 0.02)
    check(verdict)
    with pytest.raises(UserError):
        check(replace(verdict, max_kl=0.0199))
