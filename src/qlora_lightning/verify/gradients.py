"""Is the gradient of a step the same, however the step is divided, laid out or computed?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.packed import check_packing
from qlora_lightning.plan.run import why_not_fused
from qlora_lightning.strategies.policy import GradientCheckpointing
from qlora_lightning.verify.outcome import BITS, Findings, Measurement
from qlora_lightning.verify.step import Step
from qlora_lightning.verify.subject import Subject


def accumulation(subject: Subject) -> Findings:
    """One step as 1, 2, ... n microbatches; then a short step, as an epoch ends with, which has fewer of them.

    Microbatches are no larger than the recipe's, which are what memory is known to hold; but where those are single rows, pairs are tried.
    """
    counts = [count for count in subject.divisors if count >= subject.accumulate]
    if len(counts) == 1 and len(subject.divisors) > 1:
        counts = subject.divisors[-2:]
    step = subject.steps[0]
    if len(counts) == 1 or len(step) == 1:
        return Findings(note="a step of one row cannot be divided")
    measured: list[Measurement] = []
    with subject.without_dropout():
        subject.gradient_bound  # noqa: B018  (measured first, so that its progress is a line of its own)
        with subject.showing("accumulation", len(counts) + 2):
            first = subject.compute(subject.batches(step, counts[0]), counts[0])
            for count in counts[1:]:
                measured += subject.compare(
                    f"accumulate {count} = {counts[0]}", subject.compute(subject.batches(step, count), count), first
                )
            short = step[: len(step) // 2 + 1]
            one, other = (subject.compute(subject.batches(short, count), count) for count in (counts[0], counts[-1]))
    return Findings([*measured, *subject.compare(f"short step, {counts[-1]} = {counts[0]}", other, one)])


def packing(subject: Subject) -> Findings:
    """One step with its examples in rows of their own, and end to end."""
    if subject.runner is None and (refusal := _refusal(subject)):
        if subject.data.packing:
            raise UserError(refusal)
        return Findings(note=f"this model refuses packing, which the recipe does not want either: {refusal}")
    step, length = subject.steps[0], subject.data.packed_row
    counts = [count for count in reversed(subject.divisors) if count <= subject.accumulate]
    packed = next((count for count in counts if any("position_ids" in batch for batch in subject.batches(step, count, length))), None)
    if packed is None:
        return Findings(note=f"no two examples of a microbatch fit into a row of {length:,} tokens")
    with subject.without_dropout():
        subject.kernels_bounds  # noqa: B018
        with subject.showing("packing", 2):
            apart = subject.compute(subject.batches(step, subject.accumulate), subject.accumulate)
            together = subject.compute(subject.batches(step, packed, length), packed)
    return Findings(subject.compare("packed = unpacked", together, apart, *subject.kernels_bounds))


def _refusal(subject: Subject) -> str:
    """What ``fit`` would say of packing with this model; empty where it packs."""
    try:
        with subject.module.autocast():
            check_packing(subject.module.model, subject.module.base_model)
    except UserError as error:
        return str(error)
    return ""


def checkpointing(subject: Subject) -> Findings:
    """One step under each mode of gradient checkpointing, with the recipe's dropout: what is computed again must drop the same values."""
    modes: list[GradientCheckpointing] = ["none", "full"]
    note = "auto is full without the fused path"
    if subject.runner is not None:
        modes, note = ["none", "full", "auto"], ""
    batches = subject.batches(subject.steps[0], subject.accumulate)
    steps: dict[GradientCheckpointing, Step] = {}
    with subject.showing("checkpointing", len(modes)):
        for mode in modes:
            try:
                with subject.checkpointing(mode):
                    steps[mode] = subject.compute(batches, subject.accumulate)
            except torch.OutOfMemoryError:
                if mode != "none":
                    raise
                note = "none does not fit into this device's memory"
    first, *others = steps
    exact = BITS if subject.runner is not None and subject.reproducible else None
    return Findings([one for mode in others for one in subject.compare(f"{mode} = {first}", steps[mode], steps[first], exact, exact)], note)


def fused(subject: Subject) -> Findings:
    """One step through the fused path and through transformers' blocks; and the fused path's graphs beside its eager computation."""
    if subject.runner is None:
        reason = why_not_fused(subject.module, subject.outside.device)
        return Findings(note=f"not on this device: {reason}" if reason else "not with this model: the log says why")
    if subject.module.compute == "fp8":
        return Findings(note="FP8 is not the arithmetic of transformers' blocks")
    batches = subject.batches(subject.steps[0], subject.accumulate)
    with subject.without_dropout():
        subject.kernels_bounds  # noqa: B018
        with subject.showing("fused", 3):
            with subject.eagerly():
                eager = subject.compute(batches, subject.accumulate)
            replayed = subject.compute(batches, subject.accumulate)  # every shape has run: this captures them
            captured = bool(subject.runner._captured())
            with subject.through(None), _sparing(subject):
                unfused = subject.compute(batches, subject.accumulate)
    exact = BITS if subject.reproducible else None
    between = subject.compare("fused = unfused", replayed, unfused, *subject.kernels_bounds)
    if not captured:
        return Findings(between, "this recipe trains without graphs, or has no memory for them")
    return Findings([*between, *subject.compare("graphs = eager", replayed, eager, exact, exact)])


@contextmanager
def _sparing(subject: Subject) -> Iterator[None]:
    """Transformers' blocks in no more memory than they need, which the fused path never asks them to save."""
    apply_gradient_checkpointing(subject.module.model, "full")
    try:
        yield
    finally:
        apply_gradient_checkpointing(subject.module.model, "none")
