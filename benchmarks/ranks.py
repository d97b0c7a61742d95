"""How much faster are several cards, and are their losses those of one? Whole `fit`s through the command line, then a table.

    python benchmarks/ranks.py --ranks 1 2 --large 33b        # writes 13 + 61 GiB of random weights
    python benchmarks/ranks.py --ranks 1 2 4 --large 65b      # 13 + 121 GiB
    python benchmarks/ranks.py --cpu                          # the same script on tiny models and two gloo ranks: whether it works

7B under `qlora_ddp`, the large one under `qlora_fsdp2`, each rank with the same microbatch however many there are. The rows are random
letters of exactly the given length, all supervised, one microbatch a step. tokens/s is of all ranks: the median of the steps after the
warm-up. Losses: the same steps on one card, which accumulates as many microbatches as there were ranks; the largest relative difference.
GiB: of the rank that took most.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from csv import DictReader
from dataclasses import asdict, dataclass
from pathlib import Path

from fit_loop import write_rows
from random_llama import write_checkpoint


@dataclass(frozen=True)
class Point:
    """One microbatch of one model under one strategy."""

    size: str
    strategy: str
    rows: int
    length: int
    checkpointing: str
    bits: int = 32
    """Of the optimizer's state."""


@dataclass(frozen=True)
class Fitted:
    """What a fit's metrics.csv says."""

    ranks: int
    accumulate: int
    tokens_per_second: float
    peak_gib: float
    losses: list[float]


def points(large: str, cpu: bool) -> list[Point]:
    """What is measured."""
    if cpu:
        small = ("tiny", "qlora_ddp", 2, 64, "full"), ("tiny", "qlora_ddp", 2, 96, "none"), ("tiny", "qlora_fsdp2", 1, 64, "full")
        return [Point(*one) for one in small]
    ddp = Point("7b", "qlora_ddp", 16, 512, "full"), Point("7b", "qlora_ddp", 4, 2048, "none")
    return [*ddp, Point(large, "qlora_fsdp2", 1, 512, "full", 8), Point(large, "qlora_fsdp2", 8, 512, "full", 8)]


def fit(point: Point, base: Path, folder: Path, ranks: int, accumulate: int, arguments: argparse.Namespace) -> Fitted:
    """One fit of ``accumulate`` microbatches a step on each of ``ranks``; on one rank always the strategy of one device."""
    whole = point.rows * ranks * accumulate
    rows = folder / f"{whole}x{point.length}.jsonl"
    write_rows(rows, whole * arguments.steps, point.length)
    root = folder / "run"
    strategy = "trainer.strategy"
    options = {
        "model.base_model": base,
        "model.lora.dropout": 0.0,
        "data.dataset.path": rows,
        "data.dataset.template": "plain",
        "data.dataset.train_on_source": "true",
        "data.global_batch_size": whole,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.devices": ranks,
        strategy: point.strategy if ranks > 1 else "qlora",
        f"{strategy}.gradient_checkpointing": point.checkpointing,
        f"{strategy}.optimizer_bits": point.bits,
        "trainer.max_steps": arguments.steps,
        "trainer.num_sanity_val_steps": 0,
        "trainer.logger": "false",
        "trainer.default_root_dir": root,
        "checkpoint.every_n_steps": 100000,
        "checkpoint.keep": 0,
        "overwrite": "true",
    }
    if arguments.cpu:
        options |= {"trainer.accelerator": "cpu", "model.compute": "fp32", "model.lora.r": 8}
    if point.strategy == "qlora_fsdp2":
        options["model.fused"] = "false"  # on one card too, so that both compute through the same blocks
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *given]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {ended.returncode}: {ended.stderr[-2000:]}")
    with (root / "metrics.csv").open() as file:
        logged = [row for row in DictReader(file) if row["train/loss"]]
    return Fitted(
        ranks,
        accumulate,
        statistics.median(float(row["train/tokens_per_second"]) for row in logged[arguments.warmup :]),
        max(float(row["memory/peak_gib"]) for row in logged),
        [float(row["train/loss"]) for row in logged],
    )


def row_of(point: Point, many: Fitted, one: Fitted, alike: Fitted) -> str:
    """A line of the table: several ranks beside one, by speed (the same microbatch) and by losses (the same steps)."""
    off = max(abs(mine - other) / other for mine, other in zip(many.losses, alike.losses, strict=True))
    name = f"{point.size}, {point.rows} x {point.length}, `{point.checkpointing}`, `{point.strategy}`"
    cells = [
        name,
        many.ranks,
        f"{many.tokens_per_second:,.0f}",
        f"{many.tokens_per_second / one.tokens_per_second:.2f}",
        f"{many.peak_gib:.2f} ({one.peak_gib:.2f})",
        f"{many.losses[-1]:.4f} ({alike.losses[-1]:.4f})",
        f"{off:.1e}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def measure(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """All points; rows of the table."""
    table = []
    for point in points(arguments.large, arguments.cpu):
        base = arguments.weights / point.size
        if not (base / "config.json").is_file():
            write_checkpoint(point.size, base)
        shapes = {shape for ranks in arguments.ranks for shape in ((1, 1), (ranks, 1), (1, ranks))}
        fits = {}
        for ranks, accumulate in sorted(shapes):
            fits[ranks, accumulate] = fit(point, base, folder, ranks, accumulate, arguments)
            print(json.dumps(asdict(point) | asdict(fits[ranks, accumulate])), flush=True)
        table += [row_of(point, fits[ranks, 1], fits[1, 1], fits[1, ranks]) for ranks in arguments.ranks if ranks > 1]
    return table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="cards to train on")
    parser.add_argument("--large", default="65b", help="the model under qlora_fsdp2, a size of random_llama.py")
    parser.add_argument("--weights", type=Path, default=Path("/tmp/ranks"), help="folder of random weights, which are written if need be")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=6, help="steps whose speed does not count")
    parser.add_argument("--cpu", action="store_true", help="tiny models, two ranks, four steps")
    arguments = parser.parse_args()
    if arguments.cpu:
        arguments.ranks, arguments.steps, arguments.warmup = [1, 2], 4, 1
    arguments.weights.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        table = measure(arguments, Path(folder))
    headings = "point", "cards", "tokens/s", "to one card", "GiB a card (of one)", "last loss (of one)", "losses off"
    print("", f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|", *table, sep="\n")


if __name__ == "__main__":
    main()
