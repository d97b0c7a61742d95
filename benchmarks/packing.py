"""What do grouping by length and packing bring? Tokens/s and peak memory of `fit` on real rows, in each layout of the same set.

    python benchmarks/random_llama.py 7b /tmp/7b --tokenizer FOLDER
    python benchmarks/packing.py /tmp/7b datamodules/alpaca.yaml alpaca.json.gz --accumulate 1 4

Tokens/s are those without padding: all tokens of the steps after the warm-up over all their time, since steps differ in size. Layouts take
turns; one line a run.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import yaml

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.steps import plan_epoch

WARMUP = 5
LAYOUTS = {  # group_by_length, packing
    "padded, random": (False, False),
    "padded, grouped": (True, False),
    "packed, random": (False, True),
    "packed, grouped": (True, True),
}


def tokens_of_steps(arguments: argparse.Namespace, group_by_length: bool) -> list[int]:
    """Tokens without padding of each step of the first epoch."""
    spec = {**yaml.safe_load(arguments.dataset.read_text()), "path": str(arguments.rows), "validation_size": 0}
    data = InstructionDataModule(DatasetSpec(**spec), str(arguments.base))
    data.setup("fit")
    lengths = data.train_set.lengths
    return [int(lengths[step].sum()) for step in plan_epoch(lengths, arguments.batch, data.seed, 0, group_by_length)]


def run_fit(arguments: argparse.Namespace, accumulate: int, layout: str) -> tuple[int, float, float]:
    """Tokens, seconds and peak GiB of a fit's steps after the warm-up."""
    group_by_length, packing = LAYOUTS[layout]
    options = {
        "model.base_model": arguments.base,
        "model.lora.dropout": 0.0,
        "data.dataset": arguments.dataset,
        "data.dataset.path": arguments.rows,
        "data.dataset.validation_size": 0,
        "data.global_batch_size": arguments.batch,
        "data.group_by_length": group_by_length,
        "data.packing": packing,
        "trainer.max_steps": arguments.steps,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.strategy.gradient_checkpointing": arguments.checkpointing,
        "trainer.default_root_dir": arguments.folder,
        "trainer.logger": "false",
        "checkpoint.every_n_steps": 100000,
        "checkpoint.keep": 0,
        "overwrite": "true",
    }
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=None if arguments.verbose else subprocess.DEVNULL)
    with (arguments.folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/tokens_per_second"]]
    tokens = tokens_of_steps(arguments, group_by_length)[WARMUP : len(logged)]
    speeds = [float(row["train/tokens_per_second"]) for row in logged][WARMUP:]
    seconds = sum(count / speed for count, speed in zip(tokens, speeds, strict=True))
    return sum(tokens), seconds, max(float(row["memory/peak_gib"]) for row in logged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="checkpoint folder")
    parser.add_argument("dataset", type=Path, help="YAML of the set")
    parser.add_argument("rows", type=Path, help="file of its rows")
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--folder", type=Path, default=Path("runs/packing"))
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    print(f"{'microbatches':>12}  {'layout':16} {'tokens/s':>9} {'s/step':>7} {'peak GiB':>9}", flush=True)
    for _ in range(arguments.rounds):
        for accumulate in arguments.accumulate:
            for layout in LAYOUTS:
                tokens, seconds, peak = run_fit(arguments, accumulate, layout)
                per_step = seconds / (arguments.steps - WARMUP)
                print(f"{accumulate:>12}  {layout:16} {tokens / seconds:>9,.0f} {per_step:>7.2f} {peak:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
