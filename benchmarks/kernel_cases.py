"""The fused path's kernels on inputs of LLaMA-7B's shapes, for `kernel_speed.py`: what each is called with, gives, moves, computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from qlora_lightning.kernels.dropout import Dropout
from qlora_lightning.kernels.heads import Heads
from qlora_lightning.kernels.quantized import QuantizedWeight
from qlora_lightning.kernels.reference import IGNORED

HIDDEN, INTERMEDIATE, VOCABULARY, RANK, SCALE = 4096, 11008, 32000, 64, 0.25
HEADS = Heads(32, 32, 128)
GROUPS = {
    "qkv": (3, HIDDEN, 3 * HIDDEN),
    "o": (1, HIDDEN, HIDDEN),
    "gate_up": (2, HIDDEN, 2 * INTERMEDIATE),
    "down": (1, INTERMEDIATE, HIDDEN),
}
"""Layers that read one input: how many, their input features, all their output features."""

Given = dict[str, Tensor]


@dataclass
class Case:
    """A kernel on given inputs."""

    name: str
    tokens: int
    """0 where their number does not matter."""
    inputs: Given
    call: Callable[[ModuleType, Given], list[Tensor]]
    """Runs a module's function of that name on inputs like these; gives all that it wrote."""
    moved: int
    """Bytes that must be read or written."""
    operations: int = 0
    exact: list[Tensor] = field(default_factory=list)
    """What it must equal bit for bit."""


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    """Random numbers."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def wider(rows: int, columns: int, more: int) -> Tensor:
    """Random numbers in rows that are further apart."""
    return bf16(rows, columns + more)[:, :columns]


# ---- weights ----


def weight_cases() -> Iterator[Case]:
    """What is done with weights, whatever the number of tokens."""
    for name, (count, inputs, outputs) in GROUPS.items():
        quantized = [quantize(bf16(outputs // count, inputs, scale=0.02)) for _ in range(count)]
        weights, exact = [weight for weight, _ in quantized], torch.cat([values for _, values in quantized])
        moved = outputs * inputs * 2 + sum(weight.packed.numel() + weight.absmax.numel() for weight in weights)
        given = {"out": wider(outputs, inputs, count * RANK)}
        yield Case(f"dequantize {name}", 0, given, partial(_dequantize, weights=weights), moved, exact=[exact])
        given = {"b": torch.randn(outputs, RANK, device="cuda"), "out": bf16(outputs, inputs + count * RANK)[:, inputs:]}
        call = partial(_place_lora_b, sizes=[outputs // count] * count)
        yield Case(f"place_lora_b {name}", 0, given, call, outputs * RANK * (4 + 2 * count))


def quantize(weight: Tensor) -> tuple[QuantizedWeight, Tensor]:
    """In NF4 with double quantisation by bitsandbytes, and what bitsandbytes makes of that again."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return QuantizedWeight.of(SimpleNamespace(data=packed, quant_state=state)), functional.dequantize_4bit(packed, state)


def _dequantize(ops: ModuleType, given: Given, weights: Sequence[QuantizedWeight]) -> list[Tensor]:
    ops.dequantize(weights, given["out"])
    return [given["out"]]


def _place_lora_b(ops: ModuleType, given: Given, sizes: Sequence[int]) -> list[Tensor]:
    ops.place_lora_b(given["b"], sizes, SCALE, given["out"])
    return [given["out"]]


# ---- LoRA ----


def lora_cases(tokens: int) -> Iterator[Case]:
    """LoRA's products of each group, without and with dropout."""
    for name, (count, inputs, outputs) in GROUPS.items():
        ranks = count * RANK
        x, a = bf16(tokens, inputs), bf16(ranks, inputs, scale=0.02)
        grown = {"dcat": bf16(tokens, inputs + ranks), "a": a, "grad_a": torch.zeros(ranks, inputs, device="cuda")}
        one = 2 * tokens * inputs * ranks
        for dropout in (None, Dropout(0.1, torch.tensor([12345], device="cuda"), 4)):
            label = name if dropout is None else f"{name}, dropout"
            given = {"x": x, "a": a, "out": bf16(tokens, inputs + ranks)[:, inputs:]}
            moved = 2 * (tokens * (inputs + ranks) + ranks * inputs)
            yield Case(f"lora_project {label}", tokens, given, partial(_lora_project, dropout=dropout), moved, one)
            if name == "down":
                given = grown | {"gate_up": bf16(tokens, 2 * inputs)}
                moved = 2 * tokens * (5 * inputs + ranks) + 10 * ranks * inputs
                yield Case(f"lora_backward_swiglu {label}", tokens, given, partial(_backward_swiglu, dropout=dropout), moved, 2 * one)
            else:
                norm = {"rstd": torch.rand(tokens, device="cuda") + 0.5, "weight": torch.rand(HIDDEN, device="cuda") + 0.5}
                given = grown | {"x": x} | (norm if name != "o" else {})
                moved = 2 * tokens * (3 * inputs + ranks) + 10 * ranks * inputs
                yield Case(f"lora_backward {label}", tokens, given, partial(_lora_backward, dropout=dropout), moved, 2 * one)
        given = {"dy": bf16(tokens, outputs), "xa": bf16(tokens, ranks), "grad_b": torch.zeros(outputs, RANK, device="cuda")}
        moved = 2 * tokens * (outputs + ranks) + 8 * outputs * RANK
        call = partial(_lora_grad_b, sizes=[outputs // count] * count)
        yield Case(f"lora_grad_b {name}", tokens, given, call, moved, 2 * tokens * outputs * RANK)


def _lora_project(ops: ModuleType, given: Given, dropout: Dropout | None) -> list[Tensor]:
    ops.lora_project(given["x"], given["a"], RANK, dropout, given["out"])
    return [given["out"]]


def _lora_backward(ops: ModuleType, given: Given, dropout: Dropout | None) -> list[Tensor]:
    norm = (given["rstd"], given["weight"]) if "rstd" in given else None
    ops.lora_backward(given["dcat"], given["x"], given["a"], RANK, dropout, given["grad_a"], norm)
    return [given["dcat"][:, : given["x"].shape[1]], given["grad_a"]]


def _backward_swiglu(ops: ModuleType, given: Given, dropout: Dropout | None) -> list[Tensor]:
    ops.lora_backward_swiglu(given["dcat"], given["gate_up"], given["a"], dropout, given["grad_a"])
    return [given["gate_up"], given["grad_a"]]


def _lora_grad_b(ops: ModuleType, given: Given, sizes: Sequence[int]) -> list[Tensor]:
    ops.lora_grad_b(given["dy"], given["xa"], RANK, sizes, SCALE, given["grad_b"])
    return [given["grad_b"]]


# ---- norms, RoPE, SwiGLU, loss ----


def elementwise_cases(tokens: int) -> Iterator[Case]:
    """What passes over tokens without a product."""
    stream, width = 2 * tokens * HIDDEN, sum(HEADS.sizes)
    weight, rstd = torch.rand(HIDDEN, device="cuda") + 0.5, torch.rand(tokens, device="cuda") + 0.5
    given = {"x": bf16(tokens, HIDDEN), "delta": bf16(tokens, HIDDEN), "weight": weight, "out": wider(tokens, HIDDEN, 192)}
    yield Case("add_rms_norm", tokens, given, _add_rms_norm, 4 * stream)
    given = {"dy": wider(tokens, HIDDEN, 192), "x": bf16(tokens, HIDDEN), "dx": bf16(tokens, HIDDEN), "rstd": rstd, "weight": weight}
    yield Case("rms_norm_backward", tokens, given, _rms_norm_backward, 4 * stream)
    frequencies = 10000.0 ** -torch.linspace(0, 1, HEADS.size // 2)
    angles = torch.outer(torch.arange(tokens).float(), frequencies).cuda()
    tables = {"cos": angles.cos(), "sin": angles.sin(), "positions": torch.arange(tokens, device="cuda", dtype=torch.int32)}
    given = {"qkv": bf16(tokens, width), "out": bf16(tokens, width)}
    yield Case("rope", tokens, given | tables, _rope, 4 * tokens * width)
    given = {name: bf16(tokens, HEADS.query, HEADS.size) for name in ("dq", "dk", "dv")} | {"out": bf16(tokens, width)}
    yield Case("rope_backward", tokens, given | tables, _rope_backward, 4 * tokens * width)
    given = {"gate_up": bf16(tokens, 2 * INTERMEDIATE), "out": wider(tokens, INTERMEDIATE, RANK)}
    yield Case("swiglu", tokens, given, _swiglu, 6 * tokens * INTERMEDIATE)
    given = {"logits": bf16(tokens, VOCABULARY), "targets": torch.randint(0, VOCABULARY, (tokens,), device="cuda")}
    given["targets"][::7] = IGNORED
    yield Case("cross_entropy", tokens, given, _cross_entropy, 4 * tokens * VOCABULARY)


def _add_rms_norm(ops: ModuleType, given: Given) -> list[Tensor]:
    return [given["out"], *ops.add_rms_norm(given["x"], given["delta"], given["weight"], 1e-5, given["out"])]


def _rms_norm_backward(ops: ModuleType, given: Given) -> list[Tensor]:
    ops.rms_norm_backward(given["dy"], given["x"], given["rstd"], given["weight"], given["dx"])
    return [given["dx"]]


def _rope(ops: ModuleType, given: Given) -> list[Tensor]:
    ops.rope(given["qkv"], HEADS, given["cos"], given["sin"], given["positions"], None, given["out"])
    return [given["out"]]


def _rope_backward(ops: ModuleType, given: Given) -> list[Tensor]:
    gradients = (given[name] for name in ("dq", "dk", "dv"))
    ops.rope_backward(*gradients, None, HEADS, given["cos"], given["sin"], given["positions"], None, given["out"])
    return [given["out"]]


def _swiglu(ops: ModuleType, given: Given) -> list[Tensor]:
    ops.swiglu(given["gate_up"], given["out"])
    return [given["out"]]


def _cross_entropy(ops: ModuleType, given: Given) -> list[Tensor]:
    return [ops.cross_entropy(given["logits"], given["targets"]), given["logits"]]
