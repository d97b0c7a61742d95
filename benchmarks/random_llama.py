"""A LLaMA-shaped checkpoint with random weights and a byte tokenizer: speed and memory of a step do not depend on the values."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

# hidden, intermediate, layers, heads, key/value heads, vocabulary
SHAPES = {
    "tiny": (256, 688, 2, 4, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
}


def write_checkpoint(size: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """Write a folder that transformers loads: one bf16 shard a layer, made on the GPU where there is one.

    ``tokenizer`` is a folder whose tokenizer (and size of vocabulary) to take, for real texts; None: one token a byte.
    """
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_tokenizer(vocabulary, folder)
    else:
        taken = AutoTokenizer.from_pretrained(tokenizer)
        taken.save_pretrained(folder)
        vocabulary = len(taken)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    shards = [
        {"model.embed_tokens.weight": random(vocabulary, hidden), "model.norm.weight": ones, "lm_head.weight": random(vocabulary, hidden)}
    ]
    weight_map: dict[str, str] = {}
    for index in range(layers + 1):
        shard = shards[0] if index == 0 else _layer(index - 1, hidden, intermediate, hidden // heads * kv_heads, random)
        name = f"model-{index:05d}.safetensors"
        save_file({key: value.clone() for key, value in shard.items()}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _layer(index: int, hidden: int, intermediate: int, kv_hidden: int, random) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}."
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_hidden, hidden),
        "self_attn.v_proj": (kv_hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    layer = {f"{prefix}{name}.weight": random(*shape) for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return layer


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """One token a byte; the other ids have names that no text spells."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        ids.setdefault(letter, len(ids))
    ids |= {f"<unused{number}>": number for number in range(len(ids), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to take instead of one token a byte")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.size, arguments.folder, arguments.tokenizer))
