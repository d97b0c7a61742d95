"""The fused path of a run on a CPU, with plain torch for kernels and no graphs: shapes, autograd, a fit beside the unfused one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import read_metrics
from safetensors.torch import load_file

from qlora_lightning.fused.family import fuse
from qlora_lightning.fused.microbatch import Shape, shape_of
from qlora_lightning.fused.runner import Runner
from qlora_lightning.kernels import reference
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.strategies.policy import MemoryPolicy


def reference_runner(model: Any, flat: FlatAdapter, policy: MemoryPolicy, device: torch.device, dtype: torch.dtype, *_: Any) -> Runner:
    """As ``fused_runner`` gives on a GPU, with plain torch for kernels."""
    return Runner(fuse(model, flat, reference, dtype, 4096), flat, policy, state_bytes=0, graphs=False)


def batch(rows: int, length: int, scored: int) -> dict[str, Any]:
    return {"input_ids": torch.zeros(rows, length, dtype=torch.int64), "scored": torch.arange(scored)}


def test_shapes_are_few() -> None:
    assert shape_of(batch(16, 512, 8192 - 16)) == Shape(16, 512, 8192)
    assert shape_of(batch(16, 450, 3000)) == shape_of(batch(16, 512, 3500)) == Shape(16, 512, 4096)
    assert {shape_of(batch(16, length, 100)).length for length in range(1, 513)} == set(range(64, 513, 64))


def test_packed_rows_become_one() -> None:
    packed = batch(2, 200, 300) | {"cu_seqlens": torch.tensor([0, 90, 200, 390, 400]), "longest": 190}
    assert shape_of(packed) == Shape(1, 512, 512, sequences=16, longest=256)


@pytest.mark.parametrize(
    "options",
    [(), ("data.packing=true",), ("trainer.accumulate_grad_batches=2",), ("trainer.gradient_clip_val=0.1",)],
    ids=str,
)
def test_a_fit_is_the_unfused_one(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    unfused = read_metrics(fit(*options, folder="unfused"))
    monkeypatch.setattr("qlora_lightning.module.fused_runner", reference_runner)
    fused = read_metrics(fit(*options, folder="fused"))
    assert len(fused) == len(unfused) >= 6
    for mine, theirs in zip(fused, unfused, strict=True):
        assert float(mine["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-4)
        assert float(mine["train/grad_norm"]) == pytest.approx(float(theirs["train/grad_norm"]), rel=1e-3)


def test_an_interrupted_fit_goes_on_to_the_bit(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's seeds are drawn from the generator that a checkpoint holds."""
    monkeypatch.setattr("qlora_lightning.module.fused_runner", reference_runner)
    whole = fit("model.lora.dropout=0.2", folder="whole")
    cut = fit("model.lora.dropout=0.2", "trainer.max_steps=3", folder="cut")
    fit("model.lora.dropout=0.2", f"ckpt_path={cut / 'checkpoints' / 'last.ckpt'}", folder="cut")
    first, second = (load_file(root / "checkpoints" / "last" / "adapter_model.safetensors") for root in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
