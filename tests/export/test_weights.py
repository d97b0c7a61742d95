"""The product of base and adapter: equal to PEFT's own to the bit, written shard by shard, refused where it would be wrong."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from families import FAMILIES, make
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_lightning.errors import UserError
from qlora_lightning.export import weights
from qlora_lightning.export.weights import AdapterFactors, Merger, TensorFiles, base_weights, nf4_round_trip
from qlora_lightning.modeling.loading import QuantizationSpec

Family = tuple[Path, Path, PeftModel]
CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base folder, an adapter folder, and the live model: the base in 4 bits with the adapter."""
    return built(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same of one family, for what has nothing to do with families."""
    return built("llama with grouped queries", tmp_path_factory.mktemp("one"))


def built(name: str, folder: Path) -> Family:
    live = make(FAMILIES[name], folder / "base").eval()
    live.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter", live


def merger(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Merger:
    return Merger(TensorFiles.of_model(base), AdapterFactors(adapter), dtype, CPU)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_product_is_that_of_peft(family: Family, tmp_path: Path) -> None:
    base, adapter, _ = family
    merger(base, adapter).write(tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    expected = peft.merge_and_unload().state_dict()
    found = written(tmp_path)
    assert expected.keys() - found.keys() <= {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    plain = TensorFiles.of_model(base)
    changed = [name for name, value in found.items() if not torch.equal(value, plain.read(name))]
    assert sorted(changed) == sorted(AdapterFactors(adapter).layers) and len(changed) == 3 * 7


def test_dequantized_weights_are_those_that_the_live_model_multiplies_with(family: Family, tmp_path: Path) -> None:
    base, adapter, live = family
    held = {name: one for name, one in live.named_parameters() if hasattr(one, "quant_state")}
    stored = base_weights(held)
    made = merger(base, adapter)
    round_trip = nf4_round_trip(QuantizationSpec(), torch.float32, CPU)
    made.write(tmp_path, stored, round_trip)
    found, factors = written(tmp_path), AdapterFactors(adapter)
    for name, parameter in held.items():
        (plain,) = base_weights([name])
        used = dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(found[plain], used + factors.product(plain, CPU))
        assert not torch.equal(found[plain], made.tensor(plain)), "storage in 4 bits changes the weights"


def test_weights_without_an_adapter_are_dequantized_too(tmp_path: Path) -> None:
    """An adapter on two kinds of layers: the others are stored in 4 bits all the same."""
    live = make(FAMILIES["llama with grouped queries"], tmp_path / "base", lora={"target_modules": ["q_proj", "v_proj"]})
    live.save_pretrained(tmp_path / "adapter")
    stored = base_weights([name for name, one in live.named_parameters() if hasattr(one, "quant_state")])
    made = merger(tmp_path / "base", tmp_path / "adapter")
    assert len(stored) == 3 * 7 and len(AdapterFactors(tmp_path / "adapter").layers) == 3 * 2
    (tmp_path / "out").mkdir()
    made.write(tmp_path / "out", stored, nf4_round_trip(QuantizationSpec(), torch.float32, CPU))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(written(tmp_path / "out")[name], TensorFiles.of_model(tmp_path / "base").read(name))


def test_a_product_is_rounded_once(one: Family) -> None:
    """bf16 of the exact sum, not a sum of what was rounded before."""
    base, adapter, _ = one
    name = "model.layers.1.mlp.down_proj.weight"
    exact = merger(base, adapter).tensor(name)
    once = merger(base, adapter, torch.bfloat16).tensor(name)
    twice = TensorFiles.of_model(base).read(name).bfloat16() + AdapterFactors(adapter).product(name, CPU).bfloat16()
    assert torch.equal(once, exact.bfloat16()) and not torch.equal(once, twice)


def test_shards_hold_the_same_and_one_is_in_memory_at_a_time(one: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = one
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    merger(base, adapter).write(tmp_path / "one")
    alive: list[weakref.ref[torch.Tensor]] = []
    bytes_at_once = []

    def save(shard: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        alive.extend(weakref.ref(tensor) for tensor in shard.values())
        gc.collect()
        bytes_at_once.append(sum(tensor.nbytes for reference in alive if (tensor := reference()) is not None))
        save_file(shard, file, metadata)

    monkeypatch.setattr(weights, "save_file", save)
    bound = 200_000
    merger(base, adapter).write(tmp_path / "many", shard_bytes=bound)
    shutil.copy(base / "config.json", tmp_path / "many")
    whole, many = written(tmp_path / "one"), written(tmp_path / "many")
    assert whole.keys() == many.keys() and all(torch.equal(value, many[name]) for name, value in whole.items())
    assert len(bytes_at_once) > 3 and max(bytes_at_once) <= bound
    index = json.loads((tmp_path / "many" / weights.INDEX_FILE).read_text())
    assert index["weight_map"].keys() == whole.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.items())


def test_a_sharded_base_is_read_by_its_index(one: Family, tmp_path: Path) -> None:
    base, adapter, _ = one
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base", max_shard_size="200KB")
    save_file({"stray": torch.zeros(1)}, tmp_path / "base" / "consolidated.safetensors")
    sharded = merger(tmp_path / "base", adapter)
    assert "stray" not in TensorFiles.of_model(tmp_path / "base").names
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(sharded.tensor(name), merger(base, adapter).tensor(name))


# ---- refusals ----


def changed_adapter(one: Family, folder: Path, **tensors: Any) -> Path:
    """A copy of the adapter with tensors added, or removed by None."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((one[1] / "adapter_config.json").read_text())
    held = load_file(one[1] / "adapter_model.safetensors") | tensors
    save_file({name: value for name, value in held.items() if value is not None}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    ["base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.weight", "base_model.model.model.norm.bias"],
)
def test_what_is_no_lora_of_a_linear_layer_is_refused(one: Family, tmp_path: Path, name: str) -> None:
    adapter = changed_adapter(one, tmp_path / "odd", **{name: torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"merge knows LoRA on linear layers, but .* also holds .*; merge that adapter with PEFT"):
        AdapterFactors(adapter)


def test_half_a_product_is_refused(one: Family, tmp_path: Path) -> None:
    adapter = changed_adapter(one, tmp_path / "half", **{"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": None})
    with pytest.raises(UserError, match=r"also holds base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"):
        AdapterFactors(adapter)


@pytest.mark.parametrize(
    "head, tied, why", [("lm_head", True, "the head, which is the embedding"), ("model.extra", False, "no such weight")]
)
def test_a_layer_that_the_base_does_not_hold_is_refused(one: Family, tmp_path: Path, head: str, tied: bool, why: str) -> None:
    factors = {f"base_model.model.{head}.lora_{kind}.weight": torch.zeros(8, 8) for kind in "AB"}
    adapter = AdapterFactors(changed_adapter(one, tmp_path / "head", **factors))
    base = TensorFiles.of_model(one[0]).empty()
    base.pop("lm_head.weight", None)
    with pytest.raises(UserError, match=f"the adapter changes {head}.weight, but in the base's files .*{why}"):
        adapter.check(base, tied)


def test_an_adapter_of_another_base_is_refused(one: Family) -> None:
    base = TensorFiles.of_model(one[0]).empty()
    base["model.layers.0.mlp.up_proj.weight"] = torch.empty(192, 64, device="meta")
    with pytest.raises(UserError, match=r"another base model: model.layers.0.mlp.up_proj.weight is \(192, 128\) there, \(192, 64\) here"):
        AdapterFactors(one[1]).check(base, tied=False)


def test_numbers_that_fp16_cannot_hold_are_refused(one: Family, tmp_path: Path) -> None:
    held = load_file(one[0] / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = 70_000.0
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj.weight has a number beyond what fp16 holds \(65,504\): 70000; use --dtype bf16"):
        merger(tmp_path, one[1], torch.float16).write(tmp_path)


def test_a_broken_or_missing_file_is_named(one: Family, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model.safetensors.index.json nor model.safetensors"):
        TensorFiles.of_model(tmp_path)
    whole = (one[0] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read \(.*\); copy it again or give another"):
        TensorFiles.of_model(tmp_path)
