"""What a model is made of: parameters and bytes by part and dtype, so that nothing is upcast or trained unseen."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Params4bit
from rich.table import Table

GIB = 2**30
NESTED_BLOCK = 256
"""Constants that bitsandbytes quantises together."""


@dataclass
class LedgerRow:
    """One part of the model in one dtype."""

    part: str
    dtype: str
    parameters: int
    num_bytes: int
    trainable: bool


def ledger(model: torch.nn.Module) -> list[LedgerRow]:
    """Rows by part and dtype. A 4-bit weight counts its true number of parameters; its quantisation constants have a row of their own.

    Of a model without values (``modeling/skeleton.py``): what it will be made of.
    """
    rows: dict[tuple[str, str, bool], LedgerRow] = {}

    def add(part: str, dtype: str, parameters: int, num_bytes: int, trainable: bool) -> None:
        row = rows.setdefault((part, dtype, trainable), LedgerRow(part, dtype, 0, 0, trainable))
        row.parameters += parameters
        row.num_bytes += num_bytes

    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Params4bit):
            add(_part(name), str(parameter.dtype).removeprefix("torch."), parameter.numel(), parameter.nbytes, parameter.requires_grad)
            continue
        stored = _to_come(parameter) if parameter.device.type == "meta" else _stored(parameter)
        add("linear layers", parameter.quant_type, stored.parameters, stored.packed, False)
        add("quantisation constants", "uint8 + float32" if stored.nested else "float32", 0, stored.constants, False)
    return sorted(rows.values(), key=lambda row: -row.num_bytes)


class _Stored(NamedTuple):
    """A 4-bit weight: its true number of parameters, and bytes."""

    parameters: int
    packed: int
    constants: int
    nested: bool
    """Whether the constants are quantised too."""


def _stored(weight: Any) -> _Stored:
    state = weight.quant_state
    nested = state.state2 if state.nested else None
    constants = state.absmax.nbytes + (nested.absmax.nbytes if nested else 0)
    return _Stored(state.shape.numel(), weight.nbytes, constants, nested is not None)


def _to_come(weight: Any) -> _Stored:
    """What bitsandbytes will make of a weight without values: two a byte, an absmax a block, double quantisation in blocks of them."""
    blocks = -(-weight.numel() // weight.blocksize)
    nested = bool(weight.compress_statistics)
    constants = blocks + -(-blocks // NESTED_BLOCK) * 4 if nested else blocks * 4
    return _Stored(weight.numel(), -(-weight.numel() // 2), constants, nested)


def _part(name: str) -> str:
    if "lora_" in name:
        return "LoRA A and B"
    for word, part in (("norm", "norms"), ("embed", "embeddings"), ("lm_head", "output head")):
        if word in name:
            return part
    return "other"


def ledger_table(rows: list[LedgerRow]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title="Model", title_justify="left")
    for heading in ("part", "dtype", "parameters", "GiB", "trained"):
        table.add_column(heading, justify="right" if heading in ("parameters", "GiB") else "left")
    for row in rows:
        table.add_row(row.part, row.dtype, f"{row.parameters:,}", f"{row.num_bytes / GIB:.3f}", "yes" if row.trainable else "no")
    table.add_section()
    total, trained = sum(row.parameters for row in rows), sum(row.parameters for row in rows if row.trainable)
    table.add_row("all", "", f"{total:,}", f"{sum(row.num_bytes for row in rows) / GIB:.3f}", f"{trained / total:.1%}")
    return table
