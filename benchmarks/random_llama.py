"""A LLaMA-shaped checkpoint with random weights and a byte tokenizer: speed and memory of a step do not depend on the values.

    python benchmarks/random_llama.py 7b /tmp/7b
    python benchmarks/random_llama.py 65b /tmp/65b --distinct 2

33B and 65B in 16 bit are 61 and 121 GiB. With ``--distinct N`` only N layers are written, and every other layer's file is a hard link
to one of them. A shard names its tensors by layer, so such a folder is no checkpoint that any tool loads: ``share_layers`` below, in the
process that loads it (``points.py`` calls it), renames tensors while files are opened. All else of loading is as usual: every layer is
read in 16 bit and quantised, one after the other; but most reads come from the page cache, so that seconds of loading hold no time of
a disk.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line sets it; torch reads it when it is imported

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
    "33b": (6656, 17920, 60, 52, 52, 32000),
    "65b": (8192, 22016, 80, 64, 64, 32000),
}
SHARED = "shared_layers"
"""Key in the index's metadata of a folder whose layers share files."""


def write_checkpoint(size: str, folder: Path, tokenizer: Path | None = None, distinct: int | None = None, positions: int = 8192) -> Path:
    """Write a folder that transformers loads: one bf16 shard a layer, made on the GPU where there is one.

    Args:
        size: One of SHAPES.
        folder: Made if it is not there.
        tokenizer: A folder whose tokenizer (and size of vocabulary) to take, for real texts; None: one token a byte.
        distinct: Layers that are written, the files of the others being links to them; None: all.
        positions: The model's longest context.
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
        max_position_embeddings=positions,
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
        name = f"model-{index:05d}.safetensors"
        if distinct is not None and index > distinct:
            written = f"model-{(index - 1) % distinct + 1:05d}.safetensors"
            (folder / name).unlink(missing_ok=True)
            (folder / name).hardlink_to(folder / written)
            keys = {_of_layer(key, index - 1) for key, file in weight_map.items() if file == written}
        else:
            shard = shards[0] if index == 0 else _layer(index - 1, hidden, intermediate, hidden // heads * kv_heads, random)
            save_file({key: value.clone() for key, value in shard.items()}, folder / name, metadata={"format": "pt"})
            keys = set(shard)
        weight_map |= dict.fromkeys(keys, name)
    metadata = {} if distinct is None else {SHARED: distinct}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
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


def _of_layer(name: str, layer: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"model.layers.{layer}.", name)


def share_layers(folder: Path) -> None:
    """Let transformers load, in this process, a folder whose layers share files. Any other folder: nothing."""
    from transformers import modeling_utils

    if SHARED in json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]:
        modeling_utils.safe_open = _opener(modeling_utils.safe_open)


def _opener(safe_open: Callable[..., Any]) -> Callable[..., Any]:
    def open_shard(path: str, *arguments: Any, **options: Any) -> Any:
        number = int(Path(path).stem.removeprefix("model-"))
        opened = safe_open(path, *arguments, **options)
        return _SharedShard(opened, number - 1) if number else opened

    return open_shard


class _SharedShard:
    """An open file of one layer under another layer's names."""

    def __init__(self, opened: Any, layer: int) -> None:
        self._opened = opened
        self._names = {_of_layer(name, layer): name for name in opened.keys()}  # noqa: SIM118  (it is no mapping)

    def keys(self) -> list[str]:
        return list(self._names)

    def get_slice(self, name: str) -> Any:
        return self._opened.get_slice(self._names[name])

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to take instead of one token a byte")
    parser.add_argument("--distinct", type=int, metavar="N", help="write N layers; the others' files are links (see above)")
    parser.add_argument("--positions", type=int, default=8192, help="the model's longest context")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.size, arguments.folder, arguments.tokenizer, arguments.distinct, arguments.positions))
