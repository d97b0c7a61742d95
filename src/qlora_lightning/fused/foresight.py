"""Whether the fused path will take a model, and the sizes that its memory follows from, before the weights are there."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from peft import PeftModel

from qlora_lightning.fused.family import NotFused, check_config, check_head, check_linear
from qlora_lightning.fused.linear import width
from qlora_lightning.fused.rungs import BlockShape
from qlora_lightning.fused.start import rope_positions

_GROUPS = {"self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)), "mlp": (("gate_proj", "up_proj"), ("down_proj",))}
"""Layers that have their input in common."""


class FusedShape(NamedTuple):
    """Sizes of a decoder that does not exist yet."""

    block: BlockShape
    layers: int
    vocabulary: int
    """Rows of the head."""
    tables: int
    """Bytes of RoPE's cosines and sines."""
    expanded: int
    """Bytes of a block's weights in 16 bits."""


def fused_shape(model: PeftModel) -> FusedShape:
    """Of a model without values (``modeling.skeleton``), what ``fuse`` would make of it.

    Raises:
        NotFused: as ``fuse`` would, where that depends on shapes.
    """
    base: Any = model.get_base_model()
    check_config(base.config)
    adapted = 0
    for layer in base.model.layers:
        for part, groups in _GROUPS.items():
            for name in chain.from_iterable(groups):
                linear = getattr(getattr(layer, part), name)
                check_linear(linear)
                adapted += sum(parameter.numel() for parameter in linear.parameters() if parameter.requires_grad)
    if adapted < sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad):
        raise NotFused("it has adapters outside of its blocks")
    attention, mlp = base.model.layers[0].self_attn, base.model.layers[0].mlp
    query, key, value = (getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
    check_head(attention.head_dim)
    block = BlockShape(
        hidden=attention.q_proj.in_features,
        intermediate=mlp.down_proj.in_features,
        query=query,
        key_value=key + value,
        heads=query // attention.head_dim,
        rank=next(iter(attention.q_proj.r.values())),
        head_norms=hasattr(attention, "q_norm"),
    )
    tables = 2 * rope_positions(base.config) * attention.head_dim // 2 * 4
    expanded = sum(_expanded(getattr(base.model.layers[0], part), names) for part, groups in _GROUPS.items() for names in groups)
    return FusedShape(block, len(base.model.layers), base.lm_head.out_features, tables, expanded)


def _expanded(part: Any, names: Sequence[str]) -> int:
    """Bytes of a group's weights in 16 bits, with the columns for LoRA's."""
    linears = [getattr(part, name) for name in names]
    columns = width(linears[0].in_features, sum(next(iter(linear.r.values())) for linear in linears))
    return 2 * columns * sum(linear.out_features for linear in linears)
