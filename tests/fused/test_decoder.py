"""The fused path against transformers and PEFT: the same 4-bit weights, the same adapter, the same loss and gradients."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES, SIZES, cosine, fused, make, packed, rows, unfused
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from qlora_lightning.fused import block
from qlora_lightning.fused.family import NotFused, fuse
from qlora_lightning.fused.microbatch import shape_of
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.kernels import reference
from qlora_lightning.kernels.dropout import Dropout, dropped
from qlora_lightning.modeling.flat import FlatAdapter


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_transformers_and_peft(family: str, tmp_path: Any) -> None:
    model = make(FAMILIES[family], tmp_path)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    batch = rows([40, 21, 33], 40)
    expected_loss, expected = unfused(model, flat, batch)
    loss, gradient = fused(decoder, flat, batch, [Rung.ALL] * 3)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert cosine(gradient, expected) > 0.999999


@pytest.mark.parametrize("family", ["mistral with a window", "qwen3 with norms of heads"])
def test_rows_laid_end_to_end_lose_nothing_but_their_padding(family: str, tmp_path: Any) -> None:
    model = make(FAMILIES[family], tmp_path)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 512)
    batch = rows([200, 21, 1, 17], 200)
    assert shape_of(batch).sequences
    expected_loss, expected = unfused(model, flat, batch)
    loss, gradient = fused(decoder, flat, batch, [Rung.ALL] * 3)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert cosine(gradient, expected) > 0.999999


@pytest.mark.parametrize("family", ["mistral with a window", "qwen3 with norms of heads"])
def test_packed_sequences_equal_rows_of_their_own(family: str, tmp_path: Any) -> None:
    model = make(FAMILIES[family], tmp_path)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    batch = packed([40, 21, 33])
    loss, gradient = fused(decoder, flat, batch, [Rung.ALL] * 3)
    alone = [unfused(model, flat, {**one, "position_ids": None}) for one in _apart(batch)]
    torch.testing.assert_close(loss, sum(one[0] for one in alone), rtol=1e-5, atol=1e-5)
    assert cosine(gradient, sum((one[1] for one in alone), torch.zeros(()))) > 0.999999


def _apart(batch: dict[str, Any]) -> list[dict[str, Any]]:
    borders = batch["cu_seqlens"].tolist()
    return [{name: batch[name][:, first:last] for name in ("input_ids", "labels")} for first, last in pairwise(borders)]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    "rungs", [[Rung.NO_MLP] * 3, [Rung.ATTENTION] * 3, [Rung.INPUT] * 3, [Rung.INPUT, Rung.ATTENTION, Rung.ALL]], ids=str
)
def test_every_rung_gives_the_same_bits(rungs: list[Rung], dropout: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "MLP_TILE", 50)  # 120 tokens: two tiles and a shorter one
    model = make(FAMILIES["qwen3 with norms of heads"], tmp_path, dropout)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    batch = rows([40, 21, 33], 40)
    kept = fused(decoder, flat, batch, [Rung.ALL] * 3, seed=7)
    again = fused(decoder, flat, batch, rungs, seed=7)
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])


def test_dropout_is_pefts_with_other_random_bits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fused path's masks in the place of nn.Dropout's, PEFT computes the same: one mask a module, its own each."""
    monkeypatch.setattr(block, "MLP_TILE", 50)
    model = make(FAMILIES["llama with grouped queries"], tmp_path, dropout=0.25)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    batch = rows([64, 61, 63], 64)  # rows that the fused path neither rounds up nor joins: masks go by a token's number
    loss, gradient = fused(decoder, flat, batch, [Rung.ALL] * 3, seed=7)
    places = {
        "q_proj": (0, 0),
        "k_proj": (0, 1),
        "v_proj": (0, 2),
        "o_proj": (2, 0),
        "gate_proj": (4, 0),
        "up_proj": (4, 1),
        "down_proj": (6, 0),
    }
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            layer, linear = int(name.split("layers.")[1].split(".")[0]), name.split(".")[-3]
            stream, number = places[linear]
            masks = Dropout(0.25, torch.tensor([7]), layer * 8 + stream)
            monkeypatch.setattr(module, "forward", _masked(masks, number))
    expected_loss, expected = unfused(model, flat, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert cosine(gradient, expected) > 0.999999
    other = fused(decoder, flat, batch, [Rung.ALL] * 3, seed=8)
    assert not torch.equal(other[1], gradient)


def _masked(masks: Dropout, number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: dropped(x.flatten(0, 1), masks, number).view_as(x)


def test_what_is_not_known_says_so(tmp_path: Any) -> None:
    config = LlamaConfig(**{**SIZES, "hidden_act": "gelu"})
    model = make(config, tmp_path)
    with pytest.raises(NotFused, match="its activation is gelu, not silu"):
        fuse(model, FlatAdapter(model), reference, torch.float32, 256)


def _rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNUSUAL: dict[str, PreTrainedConfig] = {
    "biases everywhere": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "one key head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "heads wider than hidden": Qwen3Config(**{**SIZES, "head_dim": 64}, use_sliding_window=False),
    "windows on some layers": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "linear rope": LlamaConfig(**SIZES, rope_parameters=_rope("linear")),
    "yarn": LlamaConfig(**SIZES, rope_parameters=_rope("yarn")),
}


def _check(model: Any) -> None:
    """The fused path on mixed rungs gives the loss and gradients of transformers and PEFT."""
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    batch = rows([40, 21, 33], 40)
    expected_loss, expected = unfused(model, flat, batch)
    loss, gradient = fused(decoder, flat, batch, [Rung.INPUT, Rung.NO_MLP, Rung.ALL])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert cosine(gradient, expected) > 0.999999


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models(name: str, tmp_path: Any) -> None:
    _check(make(UNUSUAL[name], tmp_path))


@pytest.mark.parametrize("rank, alpha", [(1, 3), (3, 5), (7, 100), (100, 16)])
def test_any_rank_and_scale(rank: int, alpha: int, tmp_path: Any) -> None:
    _check(make(LlamaConfig(**SIZES), tmp_path, lora={"r": rank, "lora_alpha": alpha}))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "fp4-dq"])
def test_any_4_bit_storage(quant_type: str, tmp_path: Any) -> None:
    _check(make(LlamaConfig(**SIZES), tmp_path, quant_type=quant_type))


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "not every linear layer of its blocks is in 4 bits with LoRA"),
        ({"target_modules": [*LINEARS, "lm_head"]}, "it has adapters outside of its blocks"),
        ({"target_modules": [*LINEARS, "embed_tokens"]}, "it has adapters outside of its blocks"),
        ({"r": 257}, "its adapter has rank 257; fused are ranks up to 256"),
    ],
    ids=["fewer layers", "head", "embeddings", "rank"],
)
def test_an_adapter_that_would_not_be_trained_whole_is_not_fused(lora: dict[str, Any], reason: str, tmp_path: Any) -> None:
    model = make(LlamaConfig(**SIZES), tmp_path, lora=lora)
    with pytest.raises(NotFused, match=reason):
        fuse(model, FlatAdapter(model), reference, torch.float32, 256)


def test_what_is_supervised_nowhere_has_no_loss_and_no_gradient(tmp_path: Any) -> None:
    model = make(FAMILIES["llama with grouped queries"], tmp_path, dropout=0.25)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    for batch in (rows([40, 21, 33], 40), packed([40, 21, 1, 33]), rows([1], 1)):
        batch["labels"] = torch.full_like(batch["labels"], -100)
        batch["scored"] = batch["scored"][:0]
        loss, gradient = fused(decoder, flat, batch, [Rung.ALL] * 3, seed=7)
        assert float(loss) == 0 and not gradient.any()


def test_more_sequences_than_a_bucket_and_padding_between(tmp_path: Any) -> None:
    model = make(FAMILIES["llama with grouped queries"], tmp_path)
    flat = FlatAdapter(model)
    decoder = fuse(model, flat, reference, torch.float32, 256)
    batch = packed([1, 2, 17, *[5] * 20, 40])
    loss, gradient = fused(decoder, flat, batch, [Rung.ALL] * 3)
    alone = [unfused(model, flat, {**one, "position_ids": None}) for one in _apart(batch) if one["labels"].shape[1] > 1]
    torch.testing.assert_close(loss, sum(one[0] for one in alone), rtol=1e-5, atol=1e-5)
    assert cosine(gradient, sum((one[1] for one in alone), torch.zeros(()))) > 0.999999
