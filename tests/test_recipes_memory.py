"""What the recipes' comments say of memory: the planner finds room for each one's longest microbatch on the card that it is meant for."""

from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import yaml
from transformers import LlamaConfig, Qwen3Config

from qlora_lightning.fused.budget import GIB
from qlora_lightning.fused.microbatch import LENGTH_STEP
from qlora_lightning.modeling.adapters import LoRASpec
from qlora_lightning.module import QLoRAModule
from qlora_lightning.plan.longest import bound
from qlora_lightning.plan.memory import Forecast
from qlora_lightning.plan.target import gpu_of
from qlora_lightning.recipes import shipped_root
from qlora_lightning.strategies.policy import MemoryPolicy


class Base(NamedTuple):
    """A base model's sizes; the last two are the card that its recipes are for, in GiB as CUDA counts them, and the optimizer's bits."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    card_gib: float = 22  # 24 GB with error correction on, as on an A10 or L4
    bits: Literal[32, 8] = 32


BASES = {
    "huggyllama/llama-7b": Base(32, 4096, 11008, 32, 32, 32000),
    "huggyllama/llama-13b": Base(40, 5120, 13824, 40, 40, 32000),
    "huggyllama/llama-30b": Base(60, 6656, 17920, 52, 52, 32000, card_gib=23.6, bits=8),
    "huggyllama/llama-65b": Base(80, 8192, 22016, 64, 64, 32000, card_gib=47.5, bits=8),
    "meta-llama/Llama-3.1-8B-Instruct": Base(32, 4096, 14336, 32, 8, 128256),
    "mistralai/Mistral-7B-Instruct-v0.3": Base(32, 4096, 14336, 32, 8, 32768),
    "Qwen/Qwen3-8B": Base(36, 4096, 12288, 32, 8, 151936),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Base(24, 2048, 8192, 32, 32, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Base(30, 576, 1536, 9, 3, 49152, tied=True),
}
LARGER_CARD = {"hh-rlhf-33b": 31.0, "longform-33b": 31.0}
"""GiB, where the longest rows of a set need more; with the optimizer's state in 32 bits."""
RECIPES = [path for path in sorted((shipped_root() / "recipes").glob("*.yaml")) if path.stem != "quickstart"]


def longest_row(dataset: Any, recipe: Path) -> int:
    """Tokens of the longest row of a recipe's data, as the fused path rounds them up."""
    spec = yaml.safe_load((recipe.parent / dataset).read_text(encoding="utf-8")) if isinstance(dataset, str) else dataset
    tokens = spec.get("max_length") or spec["source_max_length"] + spec["target_max_length"]
    return int(-(-tokens // LENGTH_STEP) * LENGTH_STEP)


@cache
def forecast(base: str, rank: int) -> Forecast:
    """Of a base that need not be here, by its sizes."""
    sizes = BASES[base]
    kind = Qwen3Config if "Qwen3" in base else LlamaConfig
    config = kind(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=sizes.tied,
    )
    return Forecast(QLoRAModule(base, lora=LoRASpec(r=rank)), config)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_longest_microbatch_fits_the_card(recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    name = values["model"]["base_model"]
    base = BASES[name]
    card_gib = LARGER_CARD.get(recipe.stem, base.card_gib)
    bits = 32 if recipe.stem in LARGER_CARD else base.bits
    rows = values["data"]["global_batch_size"] // values["trainer"]["accumulate_grad_batches"]
    policy = MemoryPolicy(optimizer_bits=bits, paged_optimizer=False)
    plan = forecast(name, values["model"]["lora"]["r"]).on(
        gpu_of(card_gib), policy, bound(rows, longest_row(values["data"]["dataset"], recipe))
    )
    assert plan.not_fused is None
    assert plan.fits, f"{plan.step.peak / GIB:.1f} of {card_gib} GiB"
