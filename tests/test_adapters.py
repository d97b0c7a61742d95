"""LoRA on the 4-bit base, the folder it is saved in, and the base it came from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_lightning.errors import UserError
from qlora_lightning.generation import load_assistant
from qlora_lightning.modeling.adapters import LoRASpec, adapter_config, attach_lora, norms_to_fp32, save_adapter
from qlora_lightning.modeling.fingerprint import base_fingerprint
from qlora_lightning.modeling.ledger import ledger
from qlora_lightning.modeling.loading import QuantizationSpec, compute_dtype, load_base_model
from qlora_lightning.modeling.trained import adapter_spec

CPU = torch.device("cpu")


def load(base: Path, dtype: torch.dtype = torch.bfloat16, quantization: QuantizationSpec | None = None):
    return load_base_model(str(base), quantization or QuantizationSpec(), dtype, CPU)


@pytest.fixture
def adapter_folder(tiny_base: Path, tmp_path: Path) -> Path:
    """An untrained adapter as a fit saves it, with just enough metadata to be loaded."""
    save_adapter(attach_lora(load(tiny_base), LoRASpec(r=2)), tmp_path, {"base_model": str(tiny_base)}, "")
    return tmp_path


def test_every_linear_layer_of_the_blocks_gets_an_adapter_and_nothing_else_is_trained(tiny_base: Path) -> None:
    model = attach_lora(load(tiny_base), LoRASpec(r=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_ledger_counts_true_parameters_and_only_norms_are_upcast(tiny_base: Path) -> None:
    """Layer weights are stored in 4 bits but counted whole; embeddings and head stay in the compute dtype."""
    model = attach_lora(load(tiny_base), LoRASpec(r=4))
    norms_to_fp32(model, torch.bfloat16)
    rows = {(row.part, row.dtype): row for row in ledger(model)}
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert (rows["linear layers", "nf4"].parameters, rows["linear layers", "nf4"].num_bytes) == (linear, linear // 2)
    constants = rows["quantisation constants", "uint8 + float32"]
    blocks = linear // 64
    assert blocks < constants.num_bytes <= blocks + 14 * 4 * 2  # a byte a block, and a float for each 256 of them in each of 14 layers
    assert rows["norms", "float32"].parameters == 5 * 64
    assert rows["embeddings", "bfloat16"].parameters == rows["output head", "bfloat16"].parameters == 512 * 64
    assert rows["LoRA A and B", "float32"].trainable and sum(row.trainable for row in rows.values()) == 1


def test_weights_are_what_bitsandbytes_stores(tiny_base: Path) -> None:
    """NF4 in blocks of 64, absmax in 8 bits in blocks of 256: contract 3."""
    state = load(tiny_base).model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested, state.state2.blocksize) == ("nf4", 64, True, 256)
    assert state.absmax.dtype == torch.uint8
    single = load(tiny_base, quantization=QuantizationSpec(double_quant=False)).model.layers[0].mlp.up_proj.weight.quant_state
    assert (single.nested, single.absmax.dtype) == (False, torch.float32)


@pytest.mark.parametrize("layer", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_fingerprint_tells_bases_apart_that_differ_in_one_layer(tiny_base: Path, tmp_path: Path, layer: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    assert base_fingerprint(str(other)) == base_fingerprint(str(tiny_base))
    weights = load_file(other / "model.safetensors")
    weights[layer] = -weights[layer]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(str(other)) != base_fingerprint(str(tiny_base))


@pytest.mark.parametrize("compute, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_compute_dtype_on_a_cpu(compute: str, dtype: torch.dtype) -> None:
    assert compute_dtype(compute, CPU) == dtype  # type: ignore[arg-type]


def test_adapter_folder_loads_in_plain_peft_and_in_chat_with_equal_logits(fit: Callable[..., Path], tiny_base: Path) -> None:
    folder = fit("trainer.max_steps=3") / "checkpoints" / "last"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
    plain = PeftModel.from_pretrained(base, str(folder)).train(False)
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the inference layout rounds the scales
    assistant, metadata = load_assistant(folder, None, None)
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(assistant.model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert metadata["base_model"] == str(tiny_base)


def test_adapter_folder_says_where_it_comes_from(fit: Callable[..., Path], tiny_base: Path) -> None:
    folder = fit("data.dataset.validation_size=2") / "checkpoints" / "last"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "qlora_lightning.json", "recipe.yaml", "tokenizer.json"
    }  # fmt: skip
    metadata = json.loads((folder / "qlora_lightning.json").read_text())
    assert (metadata["step"], metadata["template"], metadata["data"]["training rows"]) == (5, "chatml", 20)
    assert len(metadata["base_fingerprint"]) == 16
    assert "val/loss" in metadata["metrics"] and metadata["metrics"]["train/loss"] > 0
    card = (folder / "README.md").read_text()
    assert f"# LoRA adapter for {tiny_base}" in card and "rank 4, alpha 16, 5 optimizer steps" in card
    assert AutoTokenizer.from_pretrained(folder).vocab_size > 0


def test_adapter_of_another_base_is_refused(fit: Callable[..., Path], tmp_path: Path) -> None:
    from qlora_lightning.errors import UserError

    folder = fit("trainer.max_steps=1") / "checkpoints" / "last"
    metadata = json.loads((folder / "qlora_lightning.json").read_text())
    (folder / "qlora_lightning.json").write_text(json.dumps(metadata | {"base_fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="with other weights"):
        load_assistant(folder, None, None)


NO_JSON = "{file} is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {end}"
BROKEN = "copy the adapter again or give another"
PLAIN = "use it with PEFT, or give another"


@pytest.mark.parametrize(
    "file, content, line",
    [
        (
            "qlora_lightning.json",
            b"{",
            NO_JSON,
        ),
        ("qlora_lightning.json", b"[]", "{file} must hold one JSON object, got list; {end}"),
        (
            "adapter_config.json",
            b"{",
            NO_JSON,
        ),
        ("adapter_model.safetensors", b"", "{file} cannot be read (Error while deserializing header: header too small); {end}"),
    ],
)
def test_broken_files_of_an_adapter(adapter_folder: Path, file: str, content: bytes, line: str) -> None:
    (adapter_folder / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_assistant(adapter_folder, None, None)
    assert str(error.value) == line.format(file=adapter_folder / file, end=BROKEN)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"use_rslora": True}, "needs plain LoRA with one r and alpha, got use_rslora True; " + PLAIN),
        ({"use_dora": True}, "needs plain LoRA with one r and alpha, got use_dora True; " + PLAIN),
        ({"alpha_pattern": {"q_proj": 8}}, "needs plain LoRA with one r and alpha, got alpha_pattern {'q_proj': 8}; " + PLAIN),
        ({"rank_pattern": {"q_proj": 8}}, "needs plain LoRA with one r and alpha, got rank_pattern {'q_proj': 8}; " + PLAIN),
        ({"peft_type": "IA3"}, "must hold a LoRA adapter, got peft_type IA3; give another adapter"),
    ],
)
def test_adapters_that_we_cannot_represent(adapter_folder: Path, change: dict[str, object], line: str) -> None:
    """In chat and where a fit starts from one; loaded in silence, their answers would be wrong."""
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for read in (adapter_spec, adapter_config):
        with pytest.raises(UserError) as error:
            read(adapter_folder)
        assert str(error.value) == f"{adapter_folder} {line}"


def test_fit_from_an_adapter_folder_starts_with_its_weights_at_step_zero(fit: Callable[..., Path]) -> None:
    from running import read_metrics

    first = fit("data.dataset.validation_size=4", folder="first")
    second = fit("data.dataset.validation_size=4", f"ckpt_path={first}/checkpoints/last", folder="second")
    ended = [float(row["val/loss"]) for row in read_metrics(first) if row["val/loss"]][-1]
    began = next(float(row["val/loss"]) for row in read_metrics(second) if row["val/loss"])
    assert began == pytest.approx(ended, rel=1e-6)
    assert next(row["step"] for row in read_metrics(second) if row["train/loss"]) == "0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_compute_in_fp32_and_the_residual_stream_stays_in_the_compute_dtype(tiny_base: Path, dtype: torch.dtype) -> None:
    model = attach_lora(load(tiny_base, dtype), LoRASpec(r=2))
    norms_to_fp32(model, dtype)
    seen = set()
    for name, module in model.named_modules():
        if name.endswith(("_proj", "down_proj.base_layer")):
            module.register_forward_hook(lambda module, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(input_ids=torch.arange(6, 20)[None])
    assert seen == {dtype}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "norm" in name} == {torch.float32}
