"""The tokenizer of small models: one token a byte."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token a byte, then ``<s> </s> <unk> <pad> <|im_start|> <|im_end|>``; 512 ids."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, "<|im_start|>": 4, "<|im_end|>": 5}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.save_pretrained(folder)
    return fast
