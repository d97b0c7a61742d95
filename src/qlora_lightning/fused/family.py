"""Which models the fused path knows, and where it finds their weights: the same modules, parameters and buffers, none copied."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from qlora_lightning.fused.block import Block
from qlora_lightning.fused.decoder import Decoder
from qlora_lightning.fused.linear import LinearGroup, Values
from qlora_lightning.kernels.heads import HeadNorms, Heads
from qlora_lightning.kernels.quantized import BLOCK, QuantizedWeight
from qlora_lightning.modeling.flat import FlatAdapter

FAMILIES = {"llama": "LLaMA", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""transformers' ``model_type`` -> name."""
_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of a sequence
_ADAPTER = "default"
_RANKS = 256  # of one layer, at most: a program of the kernels holds so many


class NotFused(Exception):
    """This model runs without the fused path; the text says why."""


def fuse(model: PeftModel, flat: FlatAdapter, kernels: ModuleType, dtype: torch.dtype, longest: int) -> Decoder:
    """A decoder over the weights of ``model``, which stays as it is and usable.

    Args:
        model: a 4-bit base with LoRA.
        flat: its adapter.
        kernels: to compute with.
        dtype: of the products.
        longest: tokens of the longest sequence.

    Raises:
        NotFused: the family, or something of this model, is not known here.
    """
    base: Any = model.get_base_model()
    config = base.config
    check_config(config)
    device = base.get_input_embeddings().weight.device
    rotary = base.model.rotary_emb
    blocks = [_block(layer, number, config, flat) for number, layer in enumerate(base.model.layers)]
    if flat.count > sum(values.data.numel() for block in blocks for group in block.groups for values in (group.a, group.b)):
        raise NotFused("it has adapters outside of its blocks")
    angles = torch.arange(longest, device=device).float()[:, None] * rotary.inv_freq.to(device, torch.float32)[None]
    return Decoder(
        kernels=kernels,
        embedding=_in_dtype(base.get_input_embeddings().weight, dtype),
        head=_in_dtype(base.lm_head.weight, dtype),
        blocks=blocks,
        norm=base.model.norm.weight.detach(),
        eps=config.rms_norm_eps,
        cos=angles.cos() * rotary.attention_scaling,
        sin=angles.sin() * rotary.attention_scaling,
        name=FAMILIES[config.model_type],
    )


def check_config(config: Any) -> None:
    """Raises NotFused for a model of this configuration of transformers."""
    if config.model_type not in FAMILIES:
        raise NotFused(f"its family is {config.model_type}; fused are {', '.join(FAMILIES.values())}")
    if config.hidden_act != "silu":
        raise NotFused(f"its activation is {config.hidden_act}, not silu")
    if (kind := config.rope_parameters["rope_type"]) not in _ROPE:
        raise NotFused(f"its RoPE is of kind {kind}")
    if getattr(config, "attention_dropout", 0.0):
        raise NotFused("it has dropout on attention")


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype != dtype:
        raise NotFused(f"its embeddings are {str(weight.dtype).removeprefix('torch.')}")
    return weight.detach()


def _block(layer: Any, number: int, config: Any, flat: FlatAdapter) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    stream = number * 8  # four groups of two
    size = attention.head_dim
    qkv = _group([attention.q_proj, attention.k_proj, attention.v_proj], flat, stream)
    query, key, _ = qkv.sizes
    check_head(size)
    return Block(
        qkv=qkv,
        out=_group([attention.o_proj], flat, stream + 2),
        gate_up=_group([mlp.gate_proj, mlp.up_proj], flat, stream + 4),
        down=_group([mlp.down_proj], flat, stream + 6),
        norm1=layer.input_layernorm.weight.detach(),
        norm2=layer.post_attention_layernorm.weight.detach(),
        eps=config.rms_norm_eps,
        heads=Heads(query // size, key // size, size),
        head_norms=_head_norms(attention),
        window=_window(attention, config),
        scale=attention.scaling,
    )


def check_head(size: int) -> None:
    """Raises NotFused for heads of ``size`` columns."""
    if size % 8 or size > 256:
        raise NotFused(f"its heads have {size} columns, which no fast attention takes")


def _head_norms(attention: Any) -> HeadNorms | None:
    if not hasattr(attention, "q_norm"):
        return None
    return HeadNorms(attention.q_norm.weight.detach(), attention.k_norm.weight.detach(), attention.q_norm.variance_epsilon)


def _window(attention: Any, config: Any) -> int | None:
    """Mistral states its window in the configuration, Qwen by layer."""
    return getattr(attention, "sliding_window", None) or (config.sliding_window if config.model_type == "mistral" else None)


def _group(layers: Sequence[Any], flat: FlatAdapter, stream: int) -> LinearGroup:
    for layer in layers:
        check_linear(layer)
    first = layers[0]
    dropout = first.lora_dropout[_ADAPTER]
    a, b = ([getattr(layer, name)[_ADAPTER].weight for layer in layers] for name in ("lora_A", "lora_B"))
    return LinearGroup(
        weights=[QuantizedWeight.of(layer.base_layer.weight) for layer in layers],
        bias=_bias([layer.base_layer.bias for layer in layers]),
        a=Values(*flat.stacked(a)),
        b=Values(*flat.stacked(b)),
        scale=first.scaling[_ADAPTER],
        dropout=getattr(dropout, "p", 0.0),
        stream=stream,
    )


def check_linear(layer: Any) -> None:
    """Raises NotFused for this linear layer of a block; its weight may have no values yet."""
    if not isinstance(layer, Linear4bit) or _ADAPTER not in layer.lora_A:
        raise NotFused("not every linear layer of its blocks is in 4 bits with LoRA")
    if (rank := layer.r[_ADAPTER]) > _RANKS:
        raise NotFused(f"its adapter has rank {rank}; fused are ranks up to {_RANKS}")
    weight: Any = layer.base_layer.weight
    stored = weight.quant_state  # None until there are values
    if (stored is not None and stored.blocksize != BLOCK) or weight.dtype != torch.uint8:
        raise NotFused(f"its 4-bit weights are not stored as bytes in blocks of {BLOCK}")
    features = int(layer.in_features or 0)
    if features % BLOCK:
        raise NotFused(f"a linear layer has {features} inputs, no multiple of {BLOCK}")


def _bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [bias.detach() for bias in biases if bias is not None]
    if not given:
        return None
    if len(given) < len(biases):
        raise NotFused("some of its linear layers with one input have a bias, others none")
    return torch.cat(given)
