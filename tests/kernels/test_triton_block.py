"""The Triton kernels in their places: a whole decoder through them (interpreted where there is no GPU) beside plain torch."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, cosine, fused, make, packed, rows

from qlora_lightning.fused import block
from qlora_lightning.fused.family import fuse
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels import reference, triton_ops
from qlora_lightning.modeling.flat import FlatAdapter


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the models here are on the CPU, which only the interpreter serves")
@pytest.mark.parametrize(("family", "dropout"), [("qwen2 with biases", 0.0), ("qwen3 with norms of heads", 0.25)])
def test_kernels_give_the_references_loss_and_gradients(
    family: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "MLP_TILE", 50)
    model = make(FAMILIES[family], tmp_path, dropout)
    flat = FlatAdapter(model)
    batch = packed([40, 21, 11]) if dropout else rows([40, 21], 40)
    rungs = [Rung.ALL, Rung.ATTENTION, Rung.INPUT]
    expected = fused(fuse(model, flat, reference, torch.float32, 512), flat, batch, rungs, seed=3)
    loss, gradient = fused(fuse(model, flat, triton_ops, torch.float32, 512), flat, batch, rungs, seed=3)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-4)
    assert cosine(gradient, expected[1]) > 0.999999
