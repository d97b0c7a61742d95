"""What the recipes' comments say of memory: the planner finds room for each one's longest microbatch on the card that it is meant for."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from qlora_lightning.fused.budget import GIB, Budget, plan_rungs
from qlora_lightning.fused.microbatch import LENGTH_STEP
from qlora_lightning.fused.rungs import BlockShape
from qlora_lightning.recipes import shipped_root

CONTEXT_GIB = 0.5
"""Of CUDA."""


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
    bits: int = 32


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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_longest_microbatch_fits_the_card(recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    base, rank = BASES[values["model"]["base_model"]], values["model"]["lora"]["r"]
    d, f, kv = base.hidden, base.intermediate, base.hidden // base.heads * base.kv_heads
    linear = base.layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    adapter = base.layers * rank * (2 * 2 * d + 2 * (d + kv) + 3 * (d + f))
    card_gib, bits = (LARGER_CARD[recipe.stem], 32) if recipe.stem in LARGER_CARD else (base.card_gib, base.bits)
    held = linear * 4.127 / 8  # NF4 with double quantisation
    held += base.vocabulary * d * 2 * (1 if base.tied else 2)
    held += adapter * (4 + 4 + 2 * bits / 8)  # values, gradients, the optimizer's two moments
    block = BlockShape(d, f, d, 2 * kv, base.heads, rank, head_norms="Qwen3" in values["model"]["base_model"])
    length = longest_row(values["data"]["dataset"], recipe)
    tokens = values["data"]["global_batch_size"] // values["trainer"]["accumulate_grad_batches"] * length
    budget = Budget(int(card_gib * GIB), int(held + CONTEXT_GIB * GIB))
    assert len(plan_rungs(block, base.layers, tokens, length, base.vocabulary, budget)) == base.layers
