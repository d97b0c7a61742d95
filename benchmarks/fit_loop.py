"""What does `fit` cost? Tokens/s and peak memory through the command line, against a bare loop over the same model, alternating.

    python benchmarks/random_llama.py 7b /tmp/7b
    python benchmarks/fit_loop.py /tmp/7b --rows 16 --length 512 --steps 20

The rows are random letters of exactly the given length, all supervised, one microbatch a step; full gradient checkpointing and the
paged 32-bit optimizer, as the recipes have them. Medians over the steps after the warm-up; one JSON line a run, then the ratio.
"""

import argparse
import csv
import json
import random
import statistics
import string
import subprocess
import sys
import time
from pathlib import Path

WARMUP = 3


def write_rows(path: Path, rows: int, length: int) -> None:
    """Rows of `length` tokens under the byte tokenizer and the plain template: BOS, letters, end of text."""
    generator = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            text = "".join(generator.choices(string.ascii_letters, k=length - 2))
            file.write(json.dumps({"prompt": text[:8], "response": text[8:]}) + "\n")


def fit_arguments(arguments: argparse.Namespace, rows: Path, folder: Path) -> list[str]:
    """The options of a `fit` under test."""
    options = {
        "model.base_model": arguments.base,
        "model.lora.r": arguments.rank,
        "model.lora.dropout": arguments.dropout,
        "data.dataset.path": rows,
        "data.dataset.template": "plain",
        "data.dataset.train_on_source": "true",
        "data.global_batch_size": arguments.rows,
        "trainer.max_steps": arguments.steps,
        "trainer.num_sanity_val_steps": 0,
        "trainer.default_root_dir": folder,
        "checkpoint.every_n_steps": 100000,
        "checkpoint.keep": 0,
        "overwrite": "true",
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_fit(arguments: argparse.Namespace, rows: Path, folder: Path) -> dict[str, float]:
    """Median tokens/s and peak GiB of a fit, from its metrics.csv."""
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *fit_arguments(arguments, rows, folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if not arguments.verbose else None)
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/tokens_per_second"]]
    speeds = [float(row["train/tokens_per_second"]) for row in logged][WARMUP:]
    return {"tokens_per_second": statistics.median(speeds), "peak_gib": max(float(row["memory/peak_gib"]) for row in logged)}


def run_bare(arguments: argparse.Namespace) -> dict[str, float]:
    """The same steps without Trainer, data loader, logging and callbacks, in a process of its own."""
    command = [sys.executable, __file__, arguments.base, "--bare"]
    for name in ("rows", "length", "steps", "rank", "dropout"):
        command += [f"--{name}", str(getattr(arguments, name))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def bare_loop(arguments: argparse.Namespace) -> None:
    """Print tokens/s and peak GiB of a plain loop."""
    import torch

    from qlora_lightning.modeling.adapters import LoRASpec, attach_lora, norms_to_fp32
    from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
    from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
    from qlora_lightning.optim import OptimizerSpec, build_optimizer
    from qlora_lightning.strategies import MemoryPolicy

    device = torch.device("cuda", 0)
    base = load_base_model(arguments.base, QuantizationSpec(), torch.bfloat16, device)
    model = attach_lora(base, LoRASpec(r=arguments.rank, dropout=arguments.dropout)).train()
    norms_to_fp32(model, torch.bfloat16)
    apply_gradient_checkpointing(model, "full")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameters, OptimizerSpec(), MemoryPolicy(), device)
    ids = torch.randint(3, 250, (arguments.rows, arguments.length), device=device)
    positions = torch.arange(arguments.length - 1, device=device)
    seconds = []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, logits_to_keep=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum") / positions.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    speed = arguments.rows * arguments.length / statistics.median(seconds[WARMUP:])
    print(json.dumps({"tokens_per_second": speed, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="checkpoint folder of random_llama.py")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=2, help="fits and bare loops, in turn")
    parser.add_argument("--folder", type=Path, default=Path("runs/fit-loop"))
    parser.add_argument("--bare", action="store_true", help="run the bare loop in this process and print its line")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    if arguments.bare:
        bare_loop(arguments)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = arguments.folder / "rows.jsonl"
    write_rows(rows, arguments.rows * arguments.steps, arguments.length)
    runs: dict[str, list[dict[str, float]]] = {"fit": [], "bare": []}
    for _ in range(arguments.rounds):
        runs["fit"].append(run_fit(arguments, rows, arguments.folder / "run"))
        runs["bare"].append(run_bare(arguments))
    for name, results in runs.items():
        for result in results:
            print(name, json.dumps({key: round(value, 2) for key, value in result.items()}), flush=True)
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["fit"], runs["bare"], strict=True)]
    print(f"fit / bare: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
