"""Fixtures that need nothing: a tokenizer built in memory and random-weight base models of a few hundred kilobytes."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line sets it; torch reads it when it is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face import: no test touches the network
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

# Before triton is imported, which transformers does: without a GPU the kernels run in triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest
from byte_tokenizer import build_tokenizer
from running import base_options
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_lightning.cache import cache_folder
from qlora_lightning.cli import main

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that tests prepare goes into the user's cache; models converted there before are used."""
    cache, converted = tmp_path_factory.mktemp("cache"), cache_folder() / "gguf"
    if converted.is_dir():
        (cache / "gguf").symlink_to(converted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LIGHTNING_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers and 64 channels with random weights and the byte tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    """The byte tokenizer of ``tiny_base``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 instruction rows of uneven length: five whole steps of four and a short one of two."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"Say {'very ' * (n % 5)}{n}.", "output": f"{'so ' * (n * 7 % 11)}{n}"} for n in range(22)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def fit(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run ``qlora-lightning fit`` in this process on the tiny base; give the run folder. Options are ``name=value`` strings."""

    def run(*options: str, folder: str = "run") -> Path:
        root = tmp_path / folder
        command = ["fit", *base_options(tiny_base, rows_file, root), *(part for option in options for part in _split(option))]
        assert main(command) == 0
        return root

    return run


def _split(option: str) -> list[str]:
    name, _, value = option.partition("=")
    return [f"--{name}", value]
