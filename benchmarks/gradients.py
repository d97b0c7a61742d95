"""Are the fused path's gradients right? Against fp32 with the same weights, beside the error of transformers + PEFT in bf16.

    python benchmarks/gradients.py                                  # small models of every family, then LLaMA-7B's layers
    python benchmarks/gradients.py --only "qwen3 with norms of heads" --device cpu   # plain torch for kernels, and no graphs

It needs nothing but the repository with its test extra: models are random (those of tests/families.py, wider), written to a temporary
folder (1.9 GB for four layers of 7B), quantised to NF4 with double quantisation where they run, and given an adapter whose B is not zero.

The yardstick is the same model in transformers and PEFT, all in fp32 with plain attention, one packed sequence after the other, whose
linear layers hold the weights that both bf16 paths multiply with, as bitsandbytes dequantises them. A line holds, of the whole adapter's
gradient, its cosine to the exact one, the relative error |g - exact| / |exact| of the fused path and of transformers + PEFT (as
`model.fused: false` computes it), and the relative errors of the losses. The fused path's are those of its third microbatch of a shape,
which comes from CUDA graphs; the last column says whether the first, without graphs, was equal to the bit.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from families import FAMILIES, cosine, packed, rows

from qlora_lightning.fused.decoder import Decoder, Forward, Tokens
from qlora_lightning.fused.family import fuse
from qlora_lightning.fused.offload import HostInputs
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.fused.runner import Runner
from qlora_lightning.fused.start import fused_runner
from qlora_lightning.kernels import reference
from qlora_lightning.modeling.adapters import LoRASpec, attach_lora, norms_to_fp32
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
from qlora_lightning.modeling.sources import quiet_transformers
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import MemoryPolicy

LAYERS = 4
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
WINDOW = 80
"""Tokens that a query sees in a family with a window: fewer than a row has."""
LLAMA_7B = "LLaMA-7B's layers"
RUNGS = {
    "none": [Rung.ALL] * LAYERS,
    "full": [Rung.INPUT] * LAYERS,
    "mixed": [Rung.INPUT, Rung.ATTENTION, Rung.NO_MLP, Rung.ALL],
}
LENGTHS = {"small": [180, 131, 97, 64], LLAMA_7B: [500, 512, 300, 411]}
LAYOUTS = {"rows": lambda lengths: rows(lengths, max(lengths)), "packed": packed}
COLUMNS = ("model", "layout", "checkpointing", "cosine", "fused", "HF + PEFT", "ratio", "loss, fused", "loss, HF + PEFT", "graph = eager")


class Result(NamedTuple):
    """What a microbatch gives."""

    loss: Tensor
    """Scalar: summed over its supervised tokens."""
    gradient: Tensor
    """[total] fp32: the flat adapter's."""


@dataclass(frozen=True)
class Case:
    """A random model in 4 bits with an adapter, as a run has it."""

    model: PeftModel
    flat: FlatAdapter
    device: torch.device
    folder: Path
    """Of its 16-bit base."""
    spec: LoRASpec


@dataclass(frozen=True)
class OnRungs(Decoder):
    """A decoder whose blocks stand where they are told, whatever its runner plans."""

    rungs: tuple[Rung, ...] = ()

    def forward(self, tokens: Tokens, rungs: Sequence[Rung], host: HostInputs | None = None) -> Forward:
        return super().forward(tokens, self.rungs, host)


def runner_on(rungs: Sequence[Rung], decoder: Decoder, flat: FlatAdapter, graphs: bool = True, offload: bool = False) -> Runner:
    """A runner whose blocks stand on ``rungs``; on a CPU without graphs."""
    weights = {field.name: getattr(decoder, field.name) for field in fields(decoder)}
    policy = MemoryPolicy(gradient_checkpointing="none", offload_inputs=offload)
    return Runner(OnRungs(**weights, rungs=tuple(rungs)), flat, policy, 0, graphs and decoder.embedding.is_cuda)


def wider(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same family in sizes at which kernels have more than one tile."""
    values = {name: value for name, value in config.to_dict().items() if name != "layer_types"} | WIDE  # those follow from the rest
    if values.get("sliding_window"):
        values["sliding_window"] = WINDOW
    return type(config)(**values)


def llama_7b() -> PreTrainedConfig:
    """LLaMA-7B with fewer layers."""
    return LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=LAYERS, num_attention_heads=32, vocab_size=32000)


def build(config: PreTrainedConfig, folder: Path, device: torch.device, rank: int = 16, dropout: float = 0.0) -> Case:
    """A random base in ``folder``, loaded and given an adapter by the functions of a run."""
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in base.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    with quiet_transformers():
        base.save_pretrained(folder)
    spec = LoRASpec(r=rank, alpha=16, dropout=dropout)
    model = attach_lora(load_base_model(str(folder), QuantizationSpec(), torch.bfloat16, device), spec)
    norms_to_fp32(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.05)
    return Case(model.train(), FlatAdapter(model), device, folder, spec)


# ---- three ways to a gradient ----


class Exact:
    """The case in fp32: dequantised weights in plain linear layers, attention as a softmax of all scores."""

    def __init__(self, case: Case) -> None:
        settings = {"dtype": torch.float32, "device_map": {"": case.device}, "attn_implementation": "eager"}
        with quiet_transformers():
            base = AutoModelForCausalLM.from_pretrained(case.folder, **settings)
        base.requires_grad_(False)
        self._model = attach_lora(base, case.spec)
        for name, module in case.model.named_modules():
            if isinstance(module, Linear4bit):
                weight: Any = module.weight
                values = dequantize_4bit(weight.data, weight.quant_state)
                self._model.get_submodule(name).weight.data = values.float()
        self._flat = FlatAdapter(self._model)
        self._flat.parameter.data.copy_(case.flat.parameter.data)

    def result(self, batch: dict[str, Any]) -> Result:
        """Of rows as they are, or of packed sequences by themselves."""
        self._flat.zero_grad()
        total = torch.zeros((), device=self._flat.gradient.device)
        for ids, labels in _apart(batch):
            logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
            loss.backward()
            total += loss.detach()
        return Result(total, self._flat.gradient.clone())


def _apart(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    ids, labels = batch["input_ids"], batch["labels"]
    if "cu_seqlens" not in batch:
        return [(ids, labels)]
    return [(ids[:, first:last], labels[:, first:last]) for first, last in pairwise(batch["cu_seqlens"].tolist())]


def unfused(case: Case, batch: dict[str, Any]) -> Result:
    """transformers + PEFT as a run without the fused path computes: 4-bit products, bf16 autocast."""
    module = QLoRAModule(str(case.folder)).to(case.device)
    module.model, module._compute_dtype = case.model, torch.bfloat16
    case.flat.zero_grad()
    loss = module.cross_entropy_sum(batch)
    loss.backward()
    return Result(loss.detach(), case.flat.gradient.clone())


def decoder_of(case: Case, fp8: bool = False) -> Decoder:
    """The fused path of a run; on a CPU with plain torch for kernels."""
    if case.device.type == "cpu":
        return fuse(case.model, case.flat, reference, torch.bfloat16, 4096)
    runner = fused_runner(case.model, case.flat, MemoryPolicy(), case.device, torch.bfloat16, fp8)
    assert runner is not None
    return runner.decoder


def fused(runner: Runner, batch: dict[str, Any]) -> Result:
    """The runner's next microbatch."""
    runner.flat.zero_grad()
    loss = runner.cross_entropy_sum(batch)
    loss.backward()
    return Result(loss.detach(), runner.flat.gradient.clone())


# ---- comparing ----


def on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of tests/families.py as a loader would hand it over."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    targets = moved["labels"][:, 1:] != -100
    return moved | {"logit_positions": targets.any(0).nonzero().flatten()}


def error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|."""
    return float((result.double() - exact.double()).norm() / exact.double().norm())


def same_bits(one: Result, other: Result) -> bool:
    """Loss and gradient."""
    return torch.equal(one.loss, other.loss) and torch.equal(one.gradient, other.gradient)


def print_line(cells: Sequence[object]) -> None:
    """A line of the table."""
    shown = (f"{cell:.2e}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("| " + " | ".join(shown) + " |", flush=True)


def print_model(name: str, config: PreTrainedConfig, lengths: list[int], rank: int, device: torch.device) -> None:
    """The lines of a model."""
    with tempfile.TemporaryDirectory() as folder:
        case = build(config, Path(folder), device, rank)
        exactly, decoder = Exact(case), decoder_of(case)
    for layout, make in LAYOUTS.items():
        batch = on(make(lengths), device)
        exact, plain = exactly.result(batch), unfused(case, batch)
        for checkpointing, rungs in RUNGS.items():
            runner = runner_on(rungs, decoder, case.flat)
            first, _, third = (fused(runner, batch) for _ in range(3))
            mine, theirs = (error(result.gradient, exact.gradient) for result in (third, plain))
            losses = [error(result.loss, exact.loss) for result in (third, plain)]
            near = f"{cosine(third.gradient, exact.gradient):.7f}"
            equal = same_bits(first, third) if device.type == "cuda" else "-"
            print_line([name, layout, checkpointing, near, mine, theirs, f"{mine / theirs:.2f}", *losses, equal])


def main() -> None:
    names = [*FAMILIES, LLAMA_7B]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME", help=f"of: {'; '.join(names)}")
    parser.add_argument("--device", type=torch.device, default="cuda")
    arguments = parser.parse_args()
    print_line(COLUMNS)
    print_line(["---"] * len(COLUMNS))
    for name in arguments.only:
        if name == LLAMA_7B:
            print_model(name, llama_7b(), LENGTHS[name], 64, arguments.device)
        else:
            print_model(name, wider(FAMILIES[name]), LENGTHS["small"], 16, arguments.device)


if __name__ == "__main__":
    main()
