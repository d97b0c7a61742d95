"""What a model is made of: parameters and bytes by part and dtype, so that nothing is upcast or trained unseen."""

from dataclasses import dataclass

import torch
from rich.table import Table

GIB = 2**30


@dataclass
class LedgerRow:
    """One part of the model in one dtype."""

    part: str
    dtype: str
    parameters: int
    num_bytes: int
    trainable: bool


def ledger(model: torch.nn.Module) -> list[LedgerRow]:
    """Rows by part and dtype. A 4-bit weight counts its true number of parameters; its quantisation constants have a row of their own."""
    rows: dict[tuple[str, str, bool], LedgerRow] = {}

    def add(part: str, dtype: str, parameters: int, num_bytes: int, trainable: bool) -> None:
        row = rows.setdefault((part, dtype, trainable), LedgerRow(part, dtype, 0, 0, trainable))
        row.parameters += parameters
        row.num_bytes += num_bytes

    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            add(_part(name), str(parameter.dtype).removeprefix("torch."), parameter.numel(), parameter.nbytes, parameter.requires_grad)
            continue
        add("linear layers", state.quant_type, state.shape.numel(), parameter.nbytes, False)
        nested = state.state2 if state.nested else None
        constants = state.absmax.nbytes + (nested.absmax.nbytes if nested else 0)
        add("quantisation constants", "uint8 + float32" if nested else "float32", 0, constants, False)
    return sorted(rows.values(), key=lambda row: -row.num_bytes)


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
