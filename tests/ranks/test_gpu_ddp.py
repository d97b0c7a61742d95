"""What only two GPUs can show; run by hand: pytest -m gpu tests/ranks/test_gpu_ddp.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import read_metrics
from starting import fit_on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two CUDA devices, found {torch.cuda.device_count()}"),
]
OPTIONS = (
    "trainer.accelerator=gpu",
    "model.compute=bf16",
    "model.lora.r=64",
    "model.optimizer.learning_rate=0.001",
    "trainer.max_epochs=3",
)
MODES = [f"trainer.strategy.gradient_checkpointing={mode}" for mode in ("auto", "full", "none")]


@pytest.fixture
def start(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """A fit on one GPU or two; gives its folder."""

    def run(ranks: int, folder: str, *options: str) -> Path:
        done = fit_on_ranks(ranks, *OPTIONS, *options, base=tiny_base, rows=rows_file, root=tmp_path / folder, seconds=300)
        assert done.returncode == 0, done.stderr
        return tmp_path / folder

    return run


def column(root: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_metrics(root) if row["train/loss"]]


@pytest.mark.parametrize("options", [*MODES, "model.fused=false", "trainer.strategy.offload_inputs=true", "data.packing=true"])
def test_two_gpus_are_one(start: Callable[..., Path], options: str) -> None:
    """In bf16, over three epochs, of which the later ones run captured graphs beside NCCL; each checkpoint compares the adapters' bits."""
    one, two = (start(ranks, str(ranks), options, "checkpoint.every_n_steps=4") for ranks in (1, 2))
    assert len(column(two, "train/loss")) == 18
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), rel=5e-3)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(start: Callable[..., Path]) -> None:
    """With dropout, and the optimizer's state paged on both."""
    whole = start(2, "whole", "model.lora.dropout=0.1", "checkpoint.every_n_steps=7", "checkpoint.keep=9")
    resumed = start(2, "resumed", "model.lora.dropout=0.1", f"ckpt_path={whole}/checkpoints/step-00000007.ckpt")
    assert column(resumed, "train/loss") == column(whole, "train/loss")[7:]
