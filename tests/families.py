"""Random models of every family that the fused path knows, batches for them, and both ways to their loss and gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from qlora_lightning.fused.decoder import Decoder
from qlora_lightning.fused.microbatch import empty_tokens, fill, shape_of
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.modeling.flat import FlatAdapter

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama with grouped queries": LlamaConfig(**SIZES),
    "llama 3's rope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "smollm2: tied embeddings": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=16),
    "qwen2 with biases": Qwen2Config(**SIZES, use_sliding_window=False),
    "qwen3 with norms of heads": Qwen3Config(**SIZES, use_sliding_window=False),
}


def make(
    config: PreTrainedConfig, folder: Any, dropout: float = 0.0, lora: dict[str, Any] | None = None, quant_type: str = "nf4-dq"
) -> PeftModel:
    """A random model of the family in 4 bits, fp32 elsewhere, and an adapter whose B is not zero; ``lora`` as for PEFT's LoraConfig."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type.removesuffix("-dq"),
        bnb_4bit_use_double_quant=quant_type.endswith("-dq"),
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"})
    base.requires_grad_(False)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | (lora or {})
    peft = get_peft_model(base, LoraConfig(**options, lora_dropout=dropout, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.05)
    assert isinstance(peft, PeftModel)
    return peft.train()


def rows(lengths: list[int], width: int, seed: int = 1) -> dict[str, Any]:
    """A batch of right-padded rows, the first third of each without loss."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 96, (len(lengths), width))
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, : length // 3] = -100
        labels[row, length:] = -100
    targets = labels[:, 1:] != -100
    return {
        "input_ids": ids,
        "labels": labels,
        "scored": F.pad(targets, (0, 1)).flatten().nonzero().flatten(),
        "row_lengths": lengths,
        "row_starts": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    }


def packed(lengths: list[int], seed: int = 1) -> dict[str, Any]:
    """Sequences of the given lengths in one row."""
    batch = rows([sum(lengths)], sum(lengths), seed)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch["labels"][0, borders[:-1].long()] = -100
    batch["scored"] = (batch["labels"].flatten()[1:] != -100).nonzero().flatten()
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return batch | {"cu_seqlens": borders, "longest": max(lengths)}


def unfused(model: PeftModel, flat: FlatAdapter, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """transformers' and PEFT's loss, summed, and the adapter's gradient."""
    flat.gradient.zero_()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.detach(), flat.gradient.clone()


def fused(decoder: Decoder, flat: FlatAdapter, batch: dict[str, Any], rungs: list[Rung], seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same of the fused path."""
    flat.gradient.zero_()
    shape = shape_of(batch)
    tokens = empty_tokens(shape, torch.device("cpu"))
    fill(tokens, shape, batch, seed)
    with torch.no_grad():
        state = decoder.forward(tokens, rungs)
        loss = state.losses.sum()
        decoder.backward(state, tokens, torch.tensor(1.0))
    return loss, flat.gradient.clone()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.double(), other.double(), dim=0))
