"""``merge`` of what a GPU has trained, on that GPU; run by hand: pytest -m gpu tests/export/test_gpu_merge.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_lightning.cli import main
from qlora_lightning.export.weights import TensorFiles, base_weights, nf4_round_trip
from qlora_lightning.modeling.loading import QuantizationSpec
from qlora_lightning.modeling.trained import load_trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]


def test_merged_on_the_gpu(fit: Callable[..., Path], tmp_path: Path, tiny_base: Path) -> None:
    options = ("trainer.accelerator=gpu", "model.compute=bf16", "data.dataset.validation_size=4")
    adapter = fit(*options) / "checkpoints" / "last"
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert found["merged"][found["chosen"]]["kl"]["value"] < 0.02
    assert not [path for path in tmp_path.iterdir() if "offload" in path.name or ".partial" in path.name]


def test_weights_are_quantised_as_the_live_models_on_the_gpu(fit: Callable[..., Path], tiny_base: Path) -> None:
    adapter = fit("trainer.accelerator=gpu", "model.compute=bf16") / "checkpoints" / "last"
    live = load_trained(adapter, None)
    round_trip = nf4_round_trip(QuantizationSpec(), live.dtype, live.device)
    base = TensorFiles.of_model(tiny_base)
    held = {name: one for name, one in live.model.named_parameters() if hasattr(one, "quant_state")}
    assert held
    for name, parameter in held.items():
        used = dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(round_trip(base.read(base_weights([name])[0])), used)
