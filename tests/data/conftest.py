"""Tokenizers built in memory and rows written here; nothing of a public data set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import SENTENCES, SPECIAL, fast_tokenizer, merging_backend
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.spec import DataPath, DatasetSpec


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, whose post-processor adds BOS and trims blanks off the offsets: as Llama 3's does."""
    return fast_tokenizer(merging_backend(SPECIAL))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their blank as a prefix: as the Llama 1 and 2 tokenizers' do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(SENTENCES * 5, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL))
    return fast_tokenizer(backend)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., DatasetSpec]:
    """A specification of a local file, with the fields that a test is about."""
    return lambda **fields: DatasetSpec(**{"path": DataPath("rows.jsonl"), **fields})


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[list[Any]], DataPath]:
    """Writes rows as JSON Lines."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> DataPath:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DataPath(path)

    return write
