"""A GGUF file becomes a folder of safetensors once, and is then a base model like any other."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lightning.modeling.sources import resolve_base
from qlora_lightning.modeling.tokenizer import load_tokenizer

HIDDEN, INNER, HEADS, KV_HEADS = 32, 64, 4, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 127)), "ab"]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A LLaMA of one layer in fp32; the weights are returned under their GGUF names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *([1] * (len(TOKENS) - 3))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
    }
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_is_converted_once_and_loads_with_its_weights(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.gguf"
    weights = write_gguf(file)
    folder = Path(resolve_base(str(file)))
    assert folder.parent == cache / "gguf" and folder.name.startswith("tiny-")
    assert "Converting tiny.gguf" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    up = torch.from_numpy(weights["blk.0.ffn_up.weight"])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, up.bfloat16().float())
    assert resolve_base(str(file)) == str(folder)
    assert "Converting" not in capsys.readouterr().err
    assert load_tokenizer(str(file)).convert_tokens_to_ids("<|im_end|>") == 2


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = resolve_base(str(file))
    with file.open("ab") as stream:
        stream.write(b"\0" * 64)
    assert resolve_base(str(file)) != first


def test_file_inside_a_package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the code of such a package is never imported')")
    write_gguf(package / "m.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_base("package://carries_a_model/m.gguf").startswith(str(cache))
