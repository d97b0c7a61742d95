"""How near is the plan? `plan --measure` at the shapes of 7B, 13B and 65B, random weights, one table.

    python benchmarks/plan_measured.py /tmp/bases
    python benchmarks/plan_measured.py /tmp/bases --shapes 7b:16x512:full,65b:1x512:auto:budget=48:bits=8

A checkpoint of random weights is written for each size that is not in the folder yet (random_llama.py; of 65B two layers, which the others
share), and deleted afterwards with --delete. Then `plan --measure` itself runs, with all that a fit has: rows of random letters of exactly
the given length, all supervised, one microbatch a step, LoRA r 64. A shape is SIZE:ROWSxLENGTH:CHECKPOINTING with fields budget, bits.

Columns, GiB: what is held before a step (weights, constants, adapter, gradient, optimizer's state), and the peak that torch allocated,
planned / measured; the largest deviation of any figure; reserved; tokens/s of the warm step; seconds to save, to reload, and of the
whole command. Exit code 1 where a figure is more than a tenth off.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit_loop import write_rows
from points import print_line
from random_llama import share_layers, write_checkpoint

GIB = 2**30
SHAPES = "7b:16x512:full,7b:4x2048:none,13b:16x512:auto:budget=24,65b:1x512:auto:budget=48:bits=8"
COLUMNS = ("shape", "held", "peak", "off at most", "reserved", "tokens/s", "save, s", "reload, s", "command, s")
DISTINCT = {"33b": 2, "65b": 2}


@dataclass(frozen=True)
class Shape:
    """One line of the table."""

    name: str
    size: str
    rows: int
    length: int
    checkpointing: str
    budget: str | None
    bits: str


def parse(text: str) -> Shape:
    """A shape by its name."""
    size, rows, checkpointing, *settings = text.split(":")
    given = dict(setting.split("=") for setting in settings)
    count, length = map(int, rows.split("x"))
    return Shape(text, size, count, length, checkpointing, given.get("budget"), given.get("bits", "32"))


def options(shape: Shape, base: Path, folder: Path) -> list[str]:
    """Of the command."""
    rows = folder / f"rows-{shape.rows}x{shape.length}.jsonl"
    write_rows(rows, shape.rows * 2, shape.length)
    values: dict[str, Any] = {
        "model.base_model": base,
        "model.lora.dropout": 0.0,
        "data.dataset.path": rows,
        "data.dataset.template": "plain",
        "data.dataset.train_on_source": "true",
        "data.global_batch_size": shape.rows,
        "trainer.strategy.gradient_checkpointing": shape.checkpointing,
        "trainer.strategy.optimizer_bits": shape.bits,
        "trainer.max_steps": 100,
        "trainer.default_root_dir": folder / "run",
    }
    if shape.budget is not None:
        values["trainer.strategy.memory_budget_gib"] = shape.budget
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def measured(shape: Shape, base: Path, folder: Path) -> dict[str, Any]:
    """What the command measured, in a process of its own: nothing of an earlier shape is left on the device."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, folder, "--one", base, *options(shape, base, folder)], stdout=subprocess.PIPE, text=True
    )
    if not done.stdout:
        sys.exit(done.returncode)  # the command has said why
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document["measured"] | {"seconds": time.perf_counter() - began}


def run_one(base: str, options: list[str]) -> int:
    """The command in this process, which opens shared layers."""
    from qlora_lightning.cli import main as command

    share_layers(Path(base))
    return command(["plan", *options, "--measure", "--json"])


def line(shape: Shape, found: dict[str, Any]) -> bool:
    """Print it; whether every figure is near enough."""
    *held, peak = found["figures"]
    pairs = [[sum(figure[key] for figure in part) / GIB for key in ("planned", "measured")] for part in (held, [peak])]
    off = max((figure["measured"] / figure["planned"] - 1 for figure in found["figures"]), key=abs)
    seconds = [found[key] for key in ("save_seconds", "reload_seconds", "seconds")]
    reserved = "" if found["reserved"] is None else found["reserved"] / GIB
    cells = [f"{planned:.2f} / {measured:.2f}" for planned, measured in pairs]
    print_line([shape.name, *cells, f"{off:+.1%}", reserved, f"{found['tokens_per_second']:,.0f}", *seconds])
    return all(figure["within"] is not False for figure in found["figures"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints lie, or are written")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--delete", action="store_true", help="delete each checkpoint after its last shape")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.exit(run_one(arguments.one[0], arguments.one[1:]))
    shapes = [parse(text) for text in arguments.shapes.split(",")]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print_line(COLUMNS)
    print_line(["---"] * len(COLUMNS))
    near = True
    for number, shape in enumerate(shapes):
        base = arguments.folder / shape.size
        if not (base / "config.json").is_file():
            write_checkpoint(shape.size, base, distinct=DISTINCT.get(shape.size))
        near &= line(shape, measured(shape, base, arguments.folder))
        if arguments.delete and all(other.size != shape.size for other in shapes[number + 1 :]):
            shutil.rmtree(base)
    sys.exit(0 if near else 1)


if __name__ == "__main__":
    main()
