"""Is one optimizer step of two ranks that of one? Two processes on the CPU, with gloo between them, each with its shard of the step.

Products are computed in fp32 there, whatever the run computes in: a planning mistake then stands out from rounding.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lightning.console import console
from qlora_lightning.data.collate import Batch
from qlora_lightning.errors import UserError
from qlora_lightning.machine import usable_cores
from qlora_lightning.modeling.adapters import LoRASpec
from qlora_lightning.modeling.ledger import ledger
from qlora_lightning.modeling.loading import QuantizationSpec
from qlora_lightning.modeling.sources import quiet_transformers, resolve_base
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import MemoryPolicy
from qlora_lightning.verify.outcome import Bound, Findings, Measurement, relative, relative_loss
from qlora_lightning.verify.step import Outside, compute_step, prepare, wake
from qlora_lightning.verify.subject import FP32, Subject

RANKS = 2
LARGEST = 10**9
"""Parameters of a base that two processes may hold, and compute with, on a CPU."""
LAYERS = 2
"""Of the base that takes a larger one's place."""
ROWS = 8
"""Of a step, the shortest, that it computes: at the width of a 7B model a CPU needs seconds for each."""


@dataclass(frozen=True)
class Job:
    """What the two processes do."""

    base: str
    revision: str | None
    lora: LoRASpec
    quantization: QuantizationSpec
    accumulate: int
    shards: Sequence[Sequence[Batch]]
    """The microbatches of each rank."""
    whole: Sequence[Batch]
    """Those of a single rank."""
    folder: Path
    """For what they find, and how they meet."""


def ranks(subject: Subject, folder: Path) -> Findings:
    """Loss and averaged gradient of two ranks against those of one.

    Args:
        subject: its first step is divided; its base is loaded anew in each process, or a smaller one of its family.
        folder: an empty one.
    """
    module, step = subject.module, subject.steps[0]
    large = sum(row.parameters for row in ledger(module.model)) > LARGEST
    if large:
        step = sorted(step, key=lambda index: subject.data.train_set.lengths[index])[:ROWS]
    count = subject.accumulate if len(step) % (subject.accumulate * RANKS) == 0 else 1
    size = -(-len(step) // (count * RANKS)) * count * RANKS
    length = subject.data.pack_length
    job = Job(
        base=_smaller(module, folder / "base") if large else module.base_model,
        revision=None if large else module.revision,
        lora=LoRASpec(module.lora.r, module.lora.alpha, 0.0, module.lora.target_modules),
        quantization=module.quantization,
        accumulate=count,
        shards=[subject.batches(step, count, length, rank, RANKS, size) for rank in range(RANKS)],
        whole=subject.batches(step, count, length, size=size),
        folder=folder,
    )
    model = f"a random model of the family with {LAYERS} layers, the base being too large" if large else "the recipe's base"
    return Findings(_run(job), f"{len(step)} rows on {model}, in fp32 on the CPU")


def _run(job: Job) -> list[Measurement]:
    try:
        processes.spawn(_rank, args=(job,), nprocs=RANKS)
    except ProcessRaisedException as error:
        _, known, line = str(error).rpartition("qlora_lightning.errors.UserError: ")
        if not known:
            raise
        raise UserError(line.strip()) from error
    found = json.loads((job.folder / "found.json").read_text())
    return [Measurement(f"two ranks = one: {what}", difference, Bound(FP32, "fp32")) for what, difference in found.items()]


def _rank(rank: int, job: Job) -> None:
    """One process: its shard's share, averaged with the other's; the first then computes the whole step alone."""
    console.quiet = True
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, usable_cores() // RANKS))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name often leads nowhere
    dist.init_process_group("gloo", init_method=f"file://{job.folder / 'meeting'}", rank=rank, world_size=RANKS)
    unpacked: Any = SimpleNamespace(packing=False)  # whether the model packs is a check of its own
    outside = Outside(torch.device("cpu"), MemoryPolicy(gradient_checkpointing="none"), unpacked, world_size=RANKS)
    module = QLoRAModule(job.base, job.revision, job.lora, job.quantization, compute="fp32", fused=False)
    torch.manual_seed(0)
    prepare(module, outside)
    wake(module)
    mine = compute_step(module, outside, job.shards[rank], job.accumulate)
    gradient, loss = mine.gradient, torch.tensor(mine.loss, dtype=torch.float64)
    for tensor in (gradient, loss):  # as DistributedDataParallel averages
        dist.all_reduce(tensor)
        tensor /= RANKS
    if rank == 0:
        outside.world_size = 1
        alone = compute_step(module, outside, job.whole, job.accumulate)
        found = {"gradient": relative(gradient, alone.gradient), "loss": relative_loss(float(loss), alone.loss)}
        (job.folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _smaller(module: QLoRAModule, folder: Path) -> str:
    """A base of the same family and width with random weights and few layers, written where it can be loaded from."""
    with quiet_transformers():
        resolved = resolve_base(module.base_model)
        config = AutoConfig.from_pretrained(resolved, revision=module.revision or "main", trust_remote_code=False)
        text = config.get_text_config()
        text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:LAYERS]
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)
