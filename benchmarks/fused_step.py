"""Where does a fused step's time go? Tokens/s, memory and a table by kind of kernel, of the fused path without the rest of `fit`.

    python benchmarks/fused_step.py 7b --point 16x512:none --point 4x2048:full:0.1 --table

A decoder of the given shape is made on the device from random 4-bit codes (speed depends on shapes alone, and nothing has to be read
from a disk), trained through `fused.runner.Runner` and the paged 32-bit AdamW, as `fit` does, with every token supervised. A point is
ROWSxLENGTH:none|full|auto[:dropout]. Medians of the steps after the warm-up; peak memory of the whole point, capture of graphs included;
all that is taken of the device at its end (CUDA's context and paged state with it).
"""

import argparse
import gc
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_lightning.fused import block
from qlora_lightning.fused.block import Block
from qlora_lightning.fused.decoder import Decoder
from qlora_lightning.fused.linear import LinearGroup, Values
from qlora_lightning.fused.runner import Runner
from qlora_lightning.kernels import triton_ops
from qlora_lightning.kernels.heads import Heads
from qlora_lightning.kernels.quantized import QuantizedWeight
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.optim import OptimizerSpec, build_optimizer
from qlora_lightning.strategies.policy import MemoryPolicy

GIB = 2**30
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Model:
    """hidden, intermediate, layers, heads, key/value heads, vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000


MODELS = {
    "7b": Model(4096, 11008, 32, 32, 32),
    "8b": Model(4096, 14336, 32, 32, 8, 128256),
    "13b": Model(5120, 13824, 40, 40, 40),
    "33b": Model(6656, 17920, 60, 52, 52),
    "65b": Model(8192, 22016, 80, 64, 64),
}
GROUPS = {"self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)), "mlp": (("gate_proj", "up_proj"), ("down_proj",))}


def sizes(model: Model) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear layer of a block."""
    d, f, kv = model.hidden, model.intermediate, model.hidden // model.heads * model.kv_heads
    return {
        "q_proj": (d, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, d),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }


def random_weight(shape: tuple[int, int]) -> QuantizedWeight:
    """Random codes with scales that give values of about 0.02."""
    import bitsandbytes.functional as bnb

    count = shape[0] * shape[1]
    blocks = count // 64
    return QuantizedWeight(
        torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device=DEVICE),
        bnb.get_4bit_type("nf4", device="cuda"),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE),
        shape,
        bnb.create_dynamic_map().to(DEVICE),
        torch.full((-(-blocks // 256),), 0.01, device=DEVICE),
        torch.tensor(0.05, device=DEVICE),
    )


class Adapter(nn.Module):
    """LoRA's parameters under the names that PEFT gives them."""

    def __init__(self, model: Model, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(model.layers):
            layer = nn.Module()
            for parent, groups in GROUPS.items():
                node = nn.Module()
                for name in (name for group in groups for name in group):
                    outputs, inputs = sizes(model)[name]
                    linear = nn.Module()
                    linear.lora_A = nn.ParameterDict({"weight": nn.Parameter(torch.randn(rank, inputs, device=DEVICE) * 0.01)})
                    linear.lora_B = nn.ParameterDict({"weight": nn.Parameter(torch.randn(outputs, rank, device=DEVICE) * 0.01)})
                    node.add_module(name, linear)
                layer.add_module(parent, node)
            self.layers.append(layer)


def make_decoder(model: Model, rank: int, positions: int) -> tuple[Decoder, FlatAdapter]:
    """A decoder with random weights."""
    adapter = Adapter(model, rank)
    flat = FlatAdapter(adapter)
    head_size = model.hidden // model.heads

    def group(layer: nn.Module, parent: str, names: tuple[str, ...], stream: int) -> LinearGroup:
        linears = [getattr(getattr(layer, parent), name) for name in names]
        return LinearGroup(
            [random_weight(sizes(model)[name]) for name in names],
            None,
            Values(*flat.stacked([linear.lora_A["weight"] for linear in linears])),
            Values(*flat.stacked([linear.lora_B["weight"] for linear in linears])),
            16 / rank,
            0.0,
            stream,
        )

    blocks = []
    for number, layer in enumerate(adapter.layers):
        groups = [
            group(layer, parent, names, 8 * number + 2 * place)
            for place, (parent, names) in enumerate((parent, names) for parent, both in GROUPS.items() for names in both)
        ]
        ones = torch.ones(model.hidden, device=DEVICE)
        blocks.append(Block(*groups, ones, ones, 1e-5, Heads(model.heads, model.kv_heads, head_size), None, None, head_size**-0.5))
    angles = torch.arange(positions, device=DEVICE)[:, None] / 10000 ** (torch.arange(0, head_size, 2, device=DEVICE) / head_size)
    embedding, head = (torch.randn(model.vocabulary, model.hidden, device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(2))
    return Decoder(triton_ops, embedding, head, blocks, ones, 1e-5, angles.cos(), angles.sin(), "random"), flat


def with_dropout(decoder: Decoder, p: float) -> Decoder:
    """The same weights with another dropout."""
    groups = ("qkv", "out", "gate_up", "down")
    return replace(decoder, blocks=[replace(b, **{name: replace(getattr(b, name), dropout=p) for name in groups}) for b in decoder.blocks])


def batch_of(rows: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Random ids, all supervised but each row's first."""
    ids = torch.randint(0, vocabulary, (rows, length), device=DEVICE)
    scored = torch.arange(rows * length, device=DEVICE).view(rows, length)[:, :-1].flatten()
    return {"input_ids": ids, "labels": ids, "scored": scored, "row_lengths": [length] * rows}


def measure(decoder: Decoder, flat: FlatAdapter, point: str, arguments: argparse.Namespace) -> None:
    """Run one point and print its line."""
    size, mode, *rest = point.split(":")
    rows, length = map(int, size.split("x"))
    dropout = float(rest[0]) if rest else 0.0
    policy = MemoryPolicy(True, arguments.bits, mode, arguments.budget, arguments.offload)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    runner = Runner(with_dropout(decoder, dropout), flat, policy, flat.parameter.numel() * arguments.bits // 4, graphs=not arguments.eager)
    optimizer = build_optimizer(flat.pieces, OptimizerSpec(), policy, DEVICE)
    times, losses = [], []

    def step() -> None:
        batch = batch_of(rows, length, len(decoder.embedding))
        loss = runner.cross_entropy_sum(batch) / (rows * length)
        loss.backward()
        norm = flat.gradient_norm()
        torch.nn.utils.clip_grads_with_norm_([flat.parameter], 0.3, norm)
        optimizer.step()
        flat.zero_grad()
        losses.append(loss.detach())

    for number in range(arguments.warmup + arguments.steps):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if number == 0:
            first = times[0]
    free, total = torch.cuda.mem_get_info()
    taken = total - free
    seconds = statistics.median(times[arguments.warmup :])
    print(
        f"POINT {arguments.model} {point:>22} {rows * length / seconds:8,.0f} tok/s {seconds * 1e3:8.1f} ms "
        f"[{min(times[arguments.warmup :]) * 1e3:.1f}, {max(times[arguments.warmup :]) * 1e3:.1f}] "
        f"allocated {torch.cuda.max_memory_allocated() / GIB:6.2f} reserved {torch.cuda.max_memory_reserved() / GIB:6.2f} "
        f"device {taken / GIB:6.2f} GiB "
        f"first {first:.1f} s loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}",
        flush=True,
    )
    if arguments.table:
        print_table(step)


KINDS = {
    "_scaled_mm": ("e4m3",),
    "attention": ("flash", "cudnn", "sdpa", "fmha", "attn"),
    "dequantise": ("_dequantize",),
    "place B": ("_place",),
    "lora_project": ("_project", "_sum_parts"),
    "lora_backward": ("_backward", "_add_parts"),
    "norms": ("rms_norm",),
    "rope": ("rope", "_turn", "_rotate"),
    "swiglu": ("swiglu",),
    "cross-entropy": ("cross_entropy",),
    "optimizer": ("Optimizer", "kOptimizer"),
    "products": ("nvjet", "gemm", "cutlass", "splitK", "cublas"),
}


def kind_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to."""
    order = ["_scaled_mm", "attention", "norms", "rope", "swiglu", "cross-entropy", "dequantise", "place B", "lora_project", "optimizer"]
    for kind in [*order, "lora_backward", "products"]:
        if any(word.lower() in kernel.lower() for word in KINDS[kind]):
            return kind
    return "other"


def print_table(step) -> None:
    """Milliseconds of device time a step, by kind and by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and e.device_type == torch.autograd.DeviceType.CUDA]
    kinds: dict[str, float] = defaultdict(float)
    for event in kernels:
        kinds[kind_of(event.key)] += event.self_device_time_total / 1e3
    for kind, milliseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {kind:16} {milliseconds:9.2f} ms")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:24]:
        print(f"    {event.self_device_time_total / 1e3:8.2f} ms {event.count:5} x  {event.key[:100]}")


def main() -> None:
    """Measure every point in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--point", action="append", required=True)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--bits", type=int, default=32, help="of the optimizer's state")
    parser.add_argument("--budget", type=float, help="GiB in all, for auto")
    parser.add_argument("--offload", action="store_true", help="kept inputs wait in host memory")
    parser.add_argument("--cap", type=float, help="most that torch's allocator may reserve, GiB")
    parser.add_argument("--any-order", action="store_true", help="attention whose last bits differ between runs (cuDNN)")
    parser.add_argument("--positions", type=int, default=4096, help="rows of RoPE's table")
    parser.add_argument("--tile", type=int, help="tokens of a tile of the MLP")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--table", action="store_true", help="where the time goes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.cap is not None:
        torch.cuda.set_per_process_memory_fraction(arguments.cap * GIB / torch.cuda.get_device_properties(0).total_memory)
    block.MLP_TILE = arguments.tile or block.MLP_TILE
    decoder, flat = make_decoder(MODELS[arguments.model], arguments.rank, arguments.positions)
    decoder = replace(decoder, reproducible=not arguments.any_order)
    print(f"{arguments.model}: {torch.cuda.memory_allocated() / GIB:.2f} GiB of weights, adapter and gradients", flush=True)
    for point in arguments.point:
        try:
            measure(decoder, flat, point, arguments)
        except Exception as error:
            print(f"POINT {arguments.model} {point}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if arguments.table:
                import traceback

                traceback.print_exc()


if __name__ == "__main__":
    main()
