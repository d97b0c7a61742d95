"""The points of `points.py` measured with a peer, Unsloth: its model, its kernels and its checkpointing, in a plain loop.

    python benchmarks/peer_points.py /tmp/7b --points 16x512-8gib,4x2048-keep --repeat 2

Same columns, rows of the same lengths (random ids, all supervised), bitsandbytes' paged 32-bit AdamW. The model is built once: dropout is
set on its LoRA modules, checkpointing switched as Unsloth switches it. `full` is its own checkpointing ("unsloth", inputs of layers in host
memory), `none` is none; `auto` is the faster of what fits the point's budget by the peak that the other setting showed: none first, its
checkpointing where that was over. What the peer is spared, and ours is not: gradient clipping, data loading, logging, callbacks.
"""

import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
import unsloth  # isort: skip  # first: it changes what transformers and peft do when they are imported

import bitsandbytes
import torch
from points import Point, cap_memory, memory_columns, point_parser, print_header, print_line, reset_memory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(base: str, longest: int, rank: int) -> Any:
    """The peer's model with an adapter on every linear layer of the blocks."""
    model, _ = unsloth.FastLanguageModel.from_pretrained(base, max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True)
    return unsloth.FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, bias="none", use_gradient_checkpointing="unsloth"
    )


def set_dropout(model: Any, probability: float) -> None:
    """Give every LoRA module this dropout; the peer's kernels read it at each call."""
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(probability) if probability else torch.nn.Identity()


def run_steps(model: Any, point: Point, checkpointing: bool, warmup: int, steps: int) -> list[Any]:
    """Train a new optimizer's first steps; the cells of the line."""
    reset_memory()
    began, seconds, losses = time.perf_counter(), list[float](), list[float]()
    set_dropout(model, point.dropout)
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    optimizer = bitsandbytes.optim.PagedAdamW32bit([weight for weight in model.parameters() if weight.requires_grad], lr=2e-4)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(warmup + steps):
        started = time.perf_counter()
        ids = torch.randint(3, 250, (point.rows, point.length), device="cuda", generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        torch.cuda.synchronize()
        ended = time.perf_counter()
        seconds.append(ended - started)
        if len(seconds) == 1:
            first = ended - began
    speed = point.rows * point.length / statistics.median(seconds[warmup:])
    return [f"{speed:,.0f}", *memory_columns(), first, losses[0]]


def run_point(model: Any, point: Point, warmup: int, steps: int) -> tuple[str, list[Any]]:
    """Which checkpointing was used, and the cells of the line."""
    if point.checkpointing != "auto":
        return point.checkpointing, run_steps(model, point, point.checkpointing == "full", warmup, steps)
    try:
        cells = run_steps(model, point, False, warmup, steps)
        if point.budget is None or cells[1] <= point.budget:
            return "auto: none", cells
    except torch.OutOfMemoryError:
        pass  # nor does it fit
    return "auto: full", run_steps(model, point, True, warmup, steps)


def main() -> None:
    parser = point_parser(__doc__)
    arguments = parser.parse_args()
    points: dict[str, Point] = arguments.points
    (rank,) = {point.rank for point in points.values()}
    cap_memory(arguments.cap_gib)
    began = time.perf_counter()
    model = build(arguments.base, max(point.length for point in points.values()), rank)
    initial = {name: weight.detach().cpu() for name, weight in model.named_parameters() if weight.requires_grad}
    print(f"model built in {time.perf_counter() - began:.1f} s", flush=True)
    print_header()
    for _ in range(arguments.repeat):
        for name, point in points.items():
            with torch.no_grad():
                for parameter, weight in model.named_parameters():
                    if parameter in initial:
                        weight.copy_(initial[parameter])
            try:
                mode, cells = run_point(model, point, arguments.warmup, arguments.steps)
            except Exception as error:  # a point that fails must not take the others with it
                mode, cells = point.checkpointing, [f"failed: {type(error).__name__}: {str(error)[:200]}"]
            print_line([f"Unsloth {unsloth.__version__}, {mode}", name, *cells])


if __name__ == "__main__":
    main()
