"""Rows, tokenizers and chat templates made here, and rows through the production code in memory."""

from collections import Counter
from collections.abc import Iterator, Sequence
from string import ascii_letters, digits, punctuation
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.dataset import IGNORED, DataReport, TokenizedDataset, TokenizedExample
from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.data.prepared import Prepared, tokenized
from qlora_lightning.data.rows import Located, Row
from qlora_lightning.data.spec import DatasetSpec

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>"]
"""What the templates of llama3, gemma and Mistral's later tokenizers need beyond ``SPECIAL``, and a mark that Zephyr spells as text."""
SENTENCES = [
    "### Human: What is the name of the river?### Assistant: The river is called Elbe.\n\nYes.\n",
    "user\nassistant\n\n",
    ".\n\n" * 9,
]


# Rows


def turns(*texts: str, system: str | None = None) -> Row:
    """A row of messages: the user's and the assistant's in turn."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": opening + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def conversation(*texts: str, system: str | None = None) -> Conversation:
    """The same as messages."""
    return [Message(message["role"], message["content"]) for message in turns(*texts, system=system)["messages"]]


def located(*rows: Row) -> list[Located]:
    """Rows as a file of them would give them."""
    return [(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]


def prepare_rows(rows: Sequence[Located], spec: DatasetSpec, tokenizer: PreTrainedTokenizerFast) -> tuple[TokenizedDataset, DataReport]:
    """The examples of rows and the account of them, by the production code, with nothing written."""
    chunks = list(tokenized(iter(rows), spec, tokenizer))
    examples = TokenizedDataset.from_batches([chunk.batch for chunk in chunks], "")
    skipped = [found for chunk in chunks for found in chunk.skipped]
    number = sum(chunk.rows for chunk in chunks)
    return Prepared(examples, number, skipped, [line for chunk in chunks for line in chunk.bad]).part(np.arange(number))


# Tokens back to text, without the tokenizer's own decoder, which drops blanks


def spelled(tokenizer: PreTrainedTokenizerFast, ids: Any) -> bytes:
    """What tokens stand for, as UTF-8. (A token may hold a part of a character.)"""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    to_bytes = _from_byte_level if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else _from_metaspace
    return b"".join(
        special[number].encode() if number in special else to_bytes(str(tokenizer.convert_ids_to_tokens(number)))
        for number in map(int, ids)
    )


def _from_byte_level(token: str) -> bytes:
    return bytes(BYTE_LETTERS[letter] for letter in token)


def _from_metaspace(token: str) -> bytes:
    return bytes([int(token[3:-1], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()


def _byte_letters() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def supervised_runs(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample) -> list[bytes]:
    """The text of each unbroken run of supervised tokens."""
    mask = example.labels != IGNORED
    assert np.array_equal(example.labels[mask], example.input_ids[mask])
    borders = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [spelled(tokenizer, example.input_ids[start:end]) for start, end in borders.reshape(-1, 2)]


def count_of(tokenizer: PreTrainedTokenizerFast, ids: Any) -> Counter[str]:
    """How often each special token is among the ids."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Counter(special[number] for number in map(int, ids) if number in special)


# Tokenizers


def fast_tokenizer(backend: Tokenizer, marks: Sequence[str] = SPECIAL[4:], **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers, with ``marks`` as further special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(marks),
        **options,
    )


def byte_backend(special: Sequence[str]) -> Tokenizer:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*special, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def merging_backend(special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with merges, whose post-processor adds BOS and trims blanks off the offsets: as Llama 3's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=394 + len(special), special_tokens=list(special), initial_alphabet=alphabet)
    backend.train_from_iterator(SENTENCES * 5, trainer)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return backend


def unigram_backend(special: Sequence[str], score: float = -1000.0) -> Tokenizer:
    """SentencePiece's way: words that carry their blank, the likeliest pieces, and bytes for letters that it does not know.

    Pieces that are no words have ``score``: so low that no text is ever read as one of them.
    """
    words = ["▁The", "▁river", "▁the", "▁", "iver", "user", "assistant", "Assistant:", "###"]
    letters = ascii_letters + digits + punctuation
    pieces = [(token, score) for token in [*special, *(f"<0x{byte:02X}>" for byte in range(256))]]
    pieces += [(word, -3.0 - n / 10) for n, word in enumerate(words)] + [(letter, -6.0 - n / 100) for n, letter in enumerate(letters)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=list(special).index("<unk>"), byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


def llama_backend(special: Sequence[str]) -> Tokenizer:
    """SentencePiece's BPE as Llama 2 and Mistral have it: a normalizer writes a blank wherever text begins, behind control tokens too."""
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *ascii_letters, *digits, *punctuation, "▁", "▁T", "he", "▁The"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "T"), ("h", "e"), ("▁T", "he")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


BACKENDS = {"bytes": byte_backend, "merges": merging_backend, "unigram": unigram_backend, "llama": llama_backend}


# Chat templates in the styles of well-known models


def _turn(opening: str, content: str, closing: str) -> str:
    return "{% for message in messages %}" + "{{ " + f"{opening} + {content} + {closing}" + " }}{% endfor %}"


CHATML_CHAT = (
    _turn(r"'<|im_start|>' + message.role + '\n'", "message.content", r"'<|im_end|>\n'")
    + r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}"
    + _turn(r"'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'", "(message.content | trim)", "'<|eot_id|>'")
    + r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR_CHAT = (
    _turn(r"'<|' + message.role + '|>\n'", "message.content", r"eos_token + '\n'")
    + r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3_CHAT = (
    _turn(
        r"'<|im_start|>' + message.role + '\n' + ('<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.last else '')",
        "message.content",
        r"'<|im_end|>\n'",
    )
    + r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _turn(
        r"'<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n'",
        "(message.content | trim)",
        r"'<end_of_turn>\n'",
    )
    + r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def alternate(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The questions and answers among a conversation's texts."""
    return zip(texts[::2], texts[1::2], strict=True)
