"""Gradient checkpointing keeps less and computes the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
from running import read_metrics


def test_full_equals_none_with_dropout(fit: Callable[..., Path]) -> None:
    options = ("model.lora.dropout=0.3", "trainer.max_steps=3")
    runs = [read_metrics(fit(*options, f"trainer.strategy.gradient_checkpointing={mode}", folder=mode)) for mode in ("none", "full")]
    for name in ("train/loss", "train/grad_norm"):
        none, full = ([float(row[name]) for row in run if row[name]] for run in runs)
        assert none == pytest.approx(full, rel=1e-6)


def test_full_computes_blocks_again(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is not just a flag: each block of the two runs forward twice a microbatch."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = {"none": 0, "full": 0}
    forward = LlamaMLP.forward
    for mode in calls:

        def counted(self: LlamaMLP, x, mode: str = mode):
            calls[mode] += 1
            return forward(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        fit("trainer.max_steps=1", f"trainer.strategy.gradient_checkpointing={mode}", folder=mode)
    assert calls["full"] == 2 * calls["none"] == 4
