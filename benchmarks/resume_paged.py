"""Does a resumed run stay paged, and give the same losses? Fit 20 steps, fit 10 and resume to 20, compare the streams bit for bit.

python benchmarks/random_llama.py 7b /tmp/7b
python benchmarks/resume_paged.py /tmp/7b
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

import torch
from fit_loop import fit_arguments, write_rows


def fit(arguments: argparse.Namespace, rows: Path, folder: Path, *more: str) -> str:
    """Run a fit and give what it said."""
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *fit_arguments(arguments, rows, folder), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


def losses(folder: Path) -> list[tuple[str, str, str]]:
    """(step, loss, gradient norm) of every logged step, as printed."""
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in csv.DictReader(file) if row["train/loss"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--folder", type=Path, default=Path("runs/resume-paged"))
    arguments = parser.parse_args()
    vars(arguments).update(rows=4, length=256, steps=20, rank=64, dropout=0.1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = arguments.folder / "rows.jsonl"
    write_rows(rows, 60, arguments.length)  # 15 steps an epoch: step 20 lies in the second
    whole, parts = arguments.folder / "whole", arguments.folder / "parts"
    said = [fit(arguments, rows, whole), fit(arguments, rows, parts, "--trainer.max_steps", "10")]
    said.append(fit(arguments, rows, parts, "--ckpt_path", "last", "--overwrite", "false"))
    for name, text in zip(("whole", "first half", "resumed"), said, strict=True):
        print(f"{name:11}", *re.findall(r"Optimizer state:.*|peak memory .*", text))
        if torch.cuda.is_available():
            size, paged = re.findall(r"Optimizer state: (\S+) GiB, (\S+) GiB", text)[0]
            assert size == paged != "0.00", f"{name}: {paged} of {size} GiB paged"
    expected, got = losses(whole), losses(parts)
    for one, other in zip(expected, got, strict=True):
        print(*one, "same" if one == other else f"DIFFERENT: {other}")
    same = expected == got and len(got) == 20
    print("bit for bit equal" if same else "NOT EQUAL")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
