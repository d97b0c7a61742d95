"""Products with frozen weights in e4m3: near those in fp32, LoRA's own exact, and refused in one line where they cannot be."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, cosine, fused, make, packed, rows
from running import base_options, line_of
from torch import Tensor

from qlora_lightning.card import adapter_card
from qlora_lightning.errors import UserError
from qlora_lightning.fused import block, fp8
from qlora_lightning.fused.family import NotFused, fuse
from qlora_lightning.fused.fp8 import Fp8Linear, in_fp8
from qlora_lightning.fused.linear import Linear, LinearGroup, Values
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels import reference
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.modeling.loading import check_fp8, compute_dtype
from qlora_lightning.plan.run import precision

CPU = torch.device("cpu")
SEED = torch.tensor([7])


def decoders(family: str, folder: Any, dropout: float = 0.0) -> tuple[Any, Any, FlatAdapter]:
    """The same model with products in fp32 and in e4m3."""
    model = make(FAMILIES[family], folder, dropout)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    return decoder, in_fp8(decoder), flat


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_near_the_exact_one(family: str, tmp_path: Any) -> None:
    exact, rounded, flat = decoders(family, tmp_path, dropout=0.25)
    batch = rows([40, 21, 33], 40)
    loss, gradient = fused(exact, flat, batch, [Rung.ALL] * 3)
    loss8, gradient8 = fused(rounded, flat, batch, [Rung.ALL] * 3)
    assert loss8 != loss
    assert abs(loss8 / loss - 1) < 0.01
    assert cosine(gradient8, gradient) > 0.98


def test_every_rung_gives_the_same_bits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "MLP_TILE", 50)
    _, decoder, flat = decoders("qwen2 with biases", tmp_path, dropout=0.25)
    batch = packed([40, 21, 33])
    kept = fused(decoder, flat, batch, [Rung.ALL] * 3)
    again = fused(decoder, flat, batch, [Rung.INPUT, Rung.ATTENTION, Rung.NO_MLP])
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])


def working(tmp_path: Any, name: str = "qkv", dtype: torch.dtype = torch.float32) -> tuple[Linear, Fp8Linear, LinearGroup]:
    """A group at work in ``dtype``, in e4m3, and the group, whose gradients are its own."""
    _, decoder, _ = decoders("qwen2 with biases", tmp_path)
    group: LinearGroup = getattr(decoder.blocks[0], name)
    group = replace(
        group,
        bias=None if group.bias is None else group.bias.to(dtype),
        a=Values(group.a.data, torch.zeros_like(group.a.data)),
        b=Values(group.b.data, torch.zeros_like(group.b.data)),
    )
    return Linear(group, reference, SEED, dtype), Fp8Linear(group, reference, SEED, dtype), group


def filled(linear: Linear, tokens: int) -> tuple[Tensor, Tensor]:
    """An input with LoRA's first product behind it, and that product."""
    torch.manual_seed(1)
    cat = linear.empty_cat(tokens)
    cat[:, : linear.group.features] = torch.randn(tokens, linear.group.features)
    return cat, linear.project(cat)


@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_product_is_off_by_what_e4m3_rounds(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    exact, rounded, group = working(tmp_path, name, dtype)
    cat, xa = filled(exact, 37)
    out, out8 = exact.forward(cat), rounded.forward(cat)
    assert out8.dtype == dtype
    assert float((out8 - out).norm() / out.norm()) < 0.05
    dy = torch.randn(37, group.outputs).to(dtype)
    dcat, dcat8 = exact.backward(dy, xa), rounded.backward(dy, xa)
    assert float((dcat8 - dcat).norm() / dcat.norm()) < 0.05


def test_scales_are_those_of_the_values(tmp_path: Any) -> None:
    exact, rounded, group = working(tmp_path)
    values = exact.weight[:, : group.features]
    torch.testing.assert_close(rounded.scales.output_O, values.abs().amax(1) / 448, rtol=1e-6, atol=0)
    torch.testing.assert_close(rounded.scales.input_I, values.abs().amax(0) / 448, rtol=1e-6, atol=0)


def test_large_weights_are_read_in_pieces(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder, _ = decoders("llama with grouped queries", tmp_path)
    whole = decoder.blocks[0].gate_up
    monkeypatch.setattr(fp8, "_ROWS", 128)  # 128 rows of 128 columns are one block of double quantisation; 192 rows, two pieces
    again = fp8._scales(whole, reference)
    assert torch.equal(again.output_O, whole.fp8_scales.output_O)
    assert torch.equal(again.input_I, whole.fp8_scales.input_I)


def test_lora_is_exact(tmp_path: Any) -> None:
    """Only the frozen product is rounded: with its weights away, output and all of LoRA's gradients are those of the exact path."""
    exact, rounded, group = working(tmp_path)
    cat, xa = filled(exact, 37)
    exact.weight[:, : group.features] = 0
    rounded.by_output.zero_()
    rounded.by_input.zero_()
    torch.testing.assert_close(rounded.forward(cat), exact.forward(cat))
    dy = torch.randn(37, group.outputs)
    results = []
    for linear in (exact, rounded):
        group.a.grad.zero_()
        group.b.grad.zero_()
        dcat = linear.backward(dy, xa)
        results.append((dcat, linear.through_lora(dcat, cat[:, : group.features]).clone(), group.a.grad.clone(), group.b.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_first_block_needs_no_weight_in_its_backward(tmp_path: Any) -> None:
    exact, rounded, group = working(tmp_path)
    _, xa = filled(exact, 37)
    dcat = rounded.backward(torch.ones(37, group.outputs), xa, input_needed=False)
    assert "by_input" not in vars(rounded)
    torch.testing.assert_close(dcat[:, group.features :], exact.backward(torch.ones(37, group.outputs), xa)[:, group.features :])


# ---- mistakes ----


def test_outputs_that_no_product_takes(tmp_path: Any) -> None:
    group = decoders("llama with grouped queries", tmp_path)[0].blocks[0].out
    odd = replace(group, weights=[replace(group.weights[0], shape=(120, 128))])
    with pytest.raises(NotFused, match="have 120 outputs, no multiple of 16, which FP8 needs"):
        fp8._scales(odd, reference)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    return torch.device("cuda", 0)


def test_a_device_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"fp8 needs a GPU of compute capability 8\.9 or more, which device cpu is not; set .* bf16"):
        check_fp8("fp8", True, CPU)
    with pytest.raises(UserError, match="which A GPU is not"):
        check_fp8("fp8", True, on_a_gpu(monkeypatch, (8, 6)))
    for compute in ("auto", "bf16", "fp32"):
        check_fp8(compute, False, CPU)  # type: ignore[arg-type]


def test_the_command_ends_in_one_line(tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "fit", *base_options(tiny_base, rows_file, tmp_path), "--model.compute", "fp8")
    assert line == "model.compute: fp8 needs a GPU of compute capability 8.9 or more, which device cpu is not; set model.compute: bf16"


def test_the_fused_path_must_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_a_gpu(monkeypatch, (8, 9))
    check_fp8("fp8", True, device)
    with pytest.raises(UserError, match=r"fp8 needs the fused path, which model\.fused: false turns off; set model\.compute: bf16"):
        check_fp8("fp8", False, device)


def test_everything_but_training_is_as_with_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that was trained in FP8 is used on any device."""
    assert compute_dtype("fp8", CPU) == compute_dtype("auto", CPU)
    assert compute_dtype("fp8", on_a_gpu(monkeypatch, (8, 0))) == torch.bfloat16


def test_the_card_says_so(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "metrics": {},
        "data": {},
        "base_model": "base",
        "base_fingerprint": "f",
        "quantization": {"quant_type": "nf4", "double_quant": True},
        "lora": {"r": 8, "alpha": 16},
        "step": 1,
        "template": "t",
        "system_prompt": "",
    }
    assert re.search(r"FP8 \(e4m3\).*not paper-exact", adapter_card(metadata | {"compute": "fp8"}, tmp_path))
    assert "FP8" not in adapter_card(metadata | {"compute": "bf16"}, tmp_path)


def test_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = SimpleNamespace(compute="fp8", fused=True)
    assert precision(module, on_a_gpu(monkeypatch, (9, 0))).endswith("not paper-exact")
    with pytest.raises(UserError, match="which device cpu is not"):
        precision(module, CPU)
