"""Steps of real lengths: the whole `fit` of a recipe against a peer that trains on the same steps, 16 sequences of mixed length each.

    python benchmarks/mixed_lengths.py lengths BASE rows.jsonl.gz > lengths.json
    python benchmarks/mixed_lengths.py ours /tmp/7b lengths.json recipes/oasst1-7b.yaml
    python benchmarks/mixed_lengths.py peer /tmp/7b lengths.json

`lengths` counts the tokens of real conversations (`input` + `output` of each row) with a base's tokenizer, cut as the recipe cuts them.
`ours` and `peer` then train on random tokens of those lengths, so that no rows have to travel; our plan of the epoch groups like lengths.
The peer (Unsloth) gets the very same steps as padded batches in a plain loop, without data loading, clipping and callbacks, in each of its
settings: its checkpointing, none, and none on one row without padding (positions beginning anew). Tokens/s are all tokens without padding
over all seconds, after the warm-up: for ours two epochs, in which most shapes come twice and are captured, for the peer 25 steps.
"""

import argparse
import csv
import gzip
import json
import os
import random
import re
import statistics
import string
import subprocess
import sys
import time
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

CUT, ROWS = 512, 16
WARMUP = {"ours": 120, "peer": 25}


def steps_of(lengths: list[int], count: int) -> list[list[int]]:
    """Lengths of the sequences of the first steps, as our plan groups them."""
    from qlora_lightning.data.steps import plan_epoch

    plan: list[list[int]] = []
    while len(plan) < count:
        plan += plan_epoch(np.array(lengths), ROWS, 42, len(plan) // ceil(len(lengths) / ROWS), True)
    return [[lengths[index] for index in step] for step in plan[:count]]


def count_lengths(base: str, rows: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    with gzip.open(rows, "rt") as file:
        texts = [row["input"] + row["output"] for row in map(json.loads, file)]
    json.dump([min(CUT, len(ids)) for ids in tokenizer(texts)["input_ids"]], sys.stdout)


def ours(base: str, lengths: list[int], recipe: str, count: int, options: list[str]) -> None:
    folder = Path("runs/mixed")
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for length in lengths:
            text = "".join(generator.choices(string.ascii_letters, k=length - 2))
            file.write(json.dumps({"prompt": text[:8], "response": text[8:]}) + "\n")
    settings = {
        "model.base_model": base,
        "data.dataset": "datamodules/local.yaml",
        "data.dataset.path": folder / "rows.jsonl",
        "data.dataset.template": "plain",
        "data.dataset.train_on_source": "true",
        "data.dataset.max_length": CUT,
        "data.dataset.validation_size": 0,
        "trainer.max_steps": count,
        "trainer.logger": "false",
        "trainer.num_sanity_val_steps": 0,
        "trainer.default_root_dir": folder / "run",
        "validation.every_n_steps": 100000,
        "checkpoint.every_n_steps": 100000,
        "overwrite": "true",
    }
    began = time.perf_counter()
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", "--config", recipe]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))] + options
    log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode:
        raise SystemExit(log.stderr[-2000:])
    print("\n".join(line for line in log.stderr.splitlines() if "Fused" in line or "attention by" in line or "planned" in line)[:1500])
    trained_on = re.search(r"local: ([\d,]+) examples, ([\d,]+) tokens", log.stderr)
    assert trained_on is not None
    # Rows left out or held out would make other steps than ``steps_of`` says, and than the peer trains on.
    assert [int(number.replace(",", "")) for number in trained_on.groups()] == [len(lengths), sum(lengths)], trained_on[0]
    with (folder / "run" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/tokens_per_second"]]
    steps = steps_of(lengths, count)
    assert len(logged) == len(steps)
    seconds = [sum(step) / float(row["train/tokens_per_second"]) for step, row in zip(steps, logged, strict=True)]
    report("ours, fit", steps, seconds, float(logged[-1]["memory/peak_gib"]), time.perf_counter() - began, WARMUP["ours"])


def report(who: str, steps: list[list[int]], seconds: list[float], peak: float, whole: float, warmup: int) -> None:
    """One line: tokens/s over all steps after the warm-up."""
    tokens = [sum(step) for step in steps]
    rate = sum(tokens[warmup:]) / sum(seconds[warmup:])
    print(
        f"MIXED {who:36} {rate:8,.0f} tokens/s, median step {statistics.median(seconds[warmup:]) * 1e3:.1f} ms of "
        f"{statistics.mean(tokens):.0f} tokens, peak {peak:.2f} GiB allocated, {whole:.0f} s in all",
        flush=True,
    )


PEER_SETTINGS = {
    "none": ("padded rows, none", False, False),
    "full": ("padded rows, its checkpointing", True, False),
    "joined": ("one row without padding, none", False, True),
}


def peer(base: str, lengths: list[int], count: int, settings: list[str]) -> None:
    import bitsandbytes
    import torch
    from peer_points import build, set_dropout

    model = build(base, 1024, 64)
    set_dropout(model, 0.1)
    steps = steps_of(lengths, count)
    for who, checkpointing, joined in (PEER_SETTINGS[setting] for setting in settings):
        import unsloth

        unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
        optimizer = bitsandbytes.optim.PagedAdamW32bit([weight for weight in model.parameters() if weight.requires_grad], lr=2e-4)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator(device="cuda").manual_seed(0)
        seconds, began = [], time.perf_counter()
        try:
            for step in steps:
                started = time.perf_counter()
                batch = batch_of(step, joined, generator)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss.item()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        except Exception as error:
            print(f"MIXED peer, {who}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        report(f"peer, {who}", steps, seconds, torch.cuda.max_memory_allocated() / 2**30, time.perf_counter() - began, WARMUP["peer"])


def batch_of(step: list[int], joined: bool, generator: Any) -> dict[str, Any]:
    """A step's sequences as padded rows, or as one row whose positions begin anew with each."""
    import torch

    if joined:
        ids = torch.randint(3, 250, (1, sum(step)), device="cuda", generator=generator)
        positions = torch.cat([torch.arange(length, device="cuda") for length in step])[None]
        sizes = torch.tensor(step, dtype=torch.int32, device="cuda")
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions, "packed_seq_lengths": sizes}
    width = -(-max(step) // 8) * 8
    ids = torch.randint(3, 250, (len(step), width), device="cuda", generator=generator)
    mask = torch.arange(width, device="cuda") < torch.tensor(step, device="cuda")[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), "attention_mask": mask.long()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lengths", "ours", "peer"])
    parser.add_argument("base")
    parser.add_argument("file", type=Path, help="rows, or the lengths of rows")
    parser.add_argument("recipe", nargs="?", default="recipes/oasst1-7b.yaml")
    parser.add_argument("--settings", default=",".join(PEER_SETTINGS), help="of the peer, in turn")
    arguments, options = parser.parse_known_args()
    if arguments.what == "lengths":
        count_lengths(arguments.base, arguments.file)
        return
    lengths = [min(CUT, max(12, length)) for length in json.loads(arguments.file.read_text())]
    if arguments.what == "ours":
        ours(arguments.base, lengths, arguments.recipe, 180, options)
    else:
        peer(arguments.base, lengths, 50, arguments.settings.split(","))


if __name__ == "__main__":
    if "peer" in sys.argv:
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        import unsloth  # noqa: F401  # first: it changes what transformers and peft do when they are imported
    main()
