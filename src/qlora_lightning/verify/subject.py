"""What is checked: one loaded model and some planned steps of its recipe, the ways to compute them, and what rounding alone may change."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from qlora_lightning.data.collate import Batch, Collator
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.steps import Microbatch, StepDataset, StepShape, microbatches_of, plan_epoch
from qlora_lightning.evaluation.counting import counting
from qlora_lightning.fused.runner import Runner
from qlora_lightning.fused.start import fused_runner
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.tokenizer import filler_id
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import GradientCheckpointing, MemoryPolicy
from qlora_lightning.verify.outcome import Bound, Measurement, relative, relative_loss
from qlora_lightning.verify.step import Outside, Step, compute_step

FP32 = 1e-5
"""Relative difference that fp32 may make: 1e-7 a value, summed up over some thousands of products and some dozens of layers."""
BF16_GRADIENT, BF16_LOSS = (2**-8, 0.2), (1e-3, 0.01)
"""Least and greatest tolerance in bf16, whatever is measured. One rounding to 8 bits, or for losses what tests hold bf16 to against exact
ones; and what no rounding explains. (Four layers of random weights at 7B's width are 0.03 off the exact gradient, by any kernels.)"""
BF16_PATHS = 0.0283
"""Of two bf16 gradients by other kernels, each at a cosine of 0.9999 to the exact one (0.0141 off), as tests hold them to."""
_JITTER = 2**-8  # one rounding to 8 bits
_REORDERINGS = 2
_ALL = 2**62  # bytes: more than there can be, so that a runner gives up its graphs


@dataclass
class Subject:
    """The model and rows that all checks share.

    Attributes:
        module: with its model, trainable.
        outside: in its Trainer's place.
        data: set up for the fit.
        accumulate: the recipe's accumulate_grad_batches.
        steps: example indices of the optimizer steps to look at.
    """

    module: QLoRAModule
    outside: Outside
    data: InstructionDataModule
    accumulate: int
    steps: list[list[int]]

    def __post_init__(self) -> None:
        self._collator = Collator(filler_id(self.data.tokenizer), self.data.pad_to_multiple_of)
        self._fetch = StepDataset(self.data.train_set).__getitems__
        self._advance: Callable[[int], None] = lambda units: None

    @property
    def runner(self) -> Runner | None:
        """The fused path, where training takes it."""
        return self.module._runner

    @property
    def reproducible(self) -> bool:
        """Whether two computations of the same are promised to be equal bit for bit."""
        return self.outside.device.type == "cpu" or (self.runner is not None and self.module.reproducible)

    @property
    def divisors(self) -> list[int]:
        """Values of accumulate_grad_batches that divide the batch."""
        size = self.data.global_batch_size
        return [count for count in range(1, size + 1) if size % count == 0]

    # ---- steps ----

    def batches(
        self, step: Sequence[int], accumulate: int, pack_length: int | None = None, rank: int = 0, ranks: int = 1, size: int | None = None
    ) -> list[Batch]:
        """A rank's microbatches of a step, planned and padded as a fit's loader does.

        Args:
            step: its examples.
            accumulate: into how many microbatches a whole step is divided.
            pack_length: tokens of a packed row; None without packing.
            rank: whose.
            ranks: how many there are.
            size: examples of a whole step; None for the recipe's.
        """
        shape = StepShape(size or self.data.global_batch_size, accumulate, rank, ranks, pack_length)
        dataset = self.data.train_set
        return [self._collate(one) for one in microbatches_of(step, dataset.lengths, dataset.targets, shape)]

    def _collate(self, microbatch: Microbatch) -> Batch:
        return self._collator.train(self._fetch(microbatch))

    def compute(self, batches: Sequence[Batch], accumulate: int, seed: int = 0) -> Step:
        """See ``compute_step``."""
        step = compute_step(self.module, self.outside, batches, accumulate, seed)
        self._advance(1)
        return step

    @contextmanager
    def showing(self, name: str, steps: int) -> Iterator[None]:
        """Show progress over so many calls of ``compute``."""
        with counting(f"verify: {name}", steps, "steps") as self._advance:
            try:
                yield
            finally:
                self._advance = lambda units: None

    # ---- ways to compute ----

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """No dropout, on the fused path neither, whose blocks read the rate when they are made."""
        rates = {one: one.p for one in self.module.model.modules() if isinstance(one, nn.Dropout) and one.p > 0}
        if not rates:
            yield
            return
        own = self.runner
        for one in rates:
            one.p = 0.0
        try:
            with self.through(self._undropped if own is not None else None):
                yield
        finally:
            for one, rate in rates.items():
                one.p = rate

    @cached_property
    def _undropped(self) -> Runner | None:
        return self.build_runner(self.outside.policy)

    def build_runner(self, policy: MemoryPolicy) -> Runner | None:
        """The fused path over the same weights under another policy, or as dropout stands now."""
        module, device = self.module, self.outside.device
        fp8 = module.compute == "fp8"
        return fused_runner(module.model, module.flat, policy, device, module.dtype_of_compute, fp8, module.reproducible)

    @contextmanager
    def through(self, runner: Runner | None) -> Iterator[None]:
        """Train through this runner, None for transformers' blocks; memory that graphs hold is freed before and after.

        What a step without memory may have left in the runner is dropped, too.
        """
        own = self.runner
        for one in (own, runner):
            if one is not None:
                one.give_up_graphs(_ALL)
        self.module._runner = runner
        try:
            yield
        finally:
            self.module._runner = own
            if runner is not None:
                runner.give_up_graphs(_ALL)
                runner._places.clear()

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Through the fused path without its graphs; afterwards each shape is captured when it comes again."""
        runner = self.runner
        assert runner is not None
        runner.give_up_graphs(_ALL)
        captures, runner._captures = runner._captures, False
        try:
            yield
        finally:
            runner._captures = captures

    @contextmanager
    def checkpointing(self, mode: GradientCheckpointing) -> Iterator[None]:
        """Keep for backward what ``mode`` says, on the path that training takes."""
        policy = replace(self.outside.policy, gradient_checkpointing=mode)
        if self.runner is not None:
            with self.through(self.build_runner(policy)):
                yield
            return
        apply_gradient_checkpointing(self.module.model, mode)
        try:
            yield
        finally:
            apply_gradient_checkpointing(self.module.model, self.outside.policy.gradient_checkpointing)

    # ---- bounds ----

    def compare(
        self, what: str, one: Step, reference: Step, gradient_bound: Bound | None = None, loss_bound: Bound | None = None
    ) -> list[Measurement]:
        """Gradient and loss of two ways to compute the same step, held to these bounds; None for what rounding alone may make."""
        return [
            Measurement(f"{what}: gradient", relative(one.gradient, reference.gradient), gradient_bound or self.gradient_bound),
            Measurement(f"{what}: loss", relative_loss(one.loss, reference.loss), loss_bound or self.loss_bound),
        ]

    @property
    def gradient_bound(self) -> Bound:
        """For gradients that differ by rounding alone."""
        return self._bound(0, BF16_GRADIENT)

    @property
    def kernels_bounds(self) -> tuple[Bound, Bound]:
        """For gradients and losses that other kernels compute, which round at other places."""
        if self.module.dtype_of_compute == torch.float32:
            return self.gradient_bound, self.loss_bound
        measured = [
            Bound(min(2 * noise, greatest), f"2 x {noise:.1e} by roundings that differ")
            for noise, (_, greatest) in zip(self.jitter, (BF16_GRADIENT, BF16_LOSS), strict=True)
        ]
        gradient = (self.gradient_bound, Bound(BF16_PATHS, "bf16, both within 1.4 % of exact"), measured[0])
        return max(gradient, key=lambda one: one.value), max(self.loss_bound, measured[1], key=lambda one: one.value)

    @property
    def loss_bound(self) -> Bound:
        """For losses that differ by rounding alone."""
        return self._bound(1, BF16_LOSS)

    def _bound(self, which: int, limits: tuple[float, float]) -> Bound:
        if self.module.dtype_of_compute == torch.float32:
            return Bound(FP32, "fp32")
        least, greatest = limits
        noise = self.rounding[which]
        return Bound(min(max(2 * noise, least), greatest), f"2 x {noise:.1e} by reordering rows" if 2 * noise > least else "bf16")

    @cached_property
    def rounding(self) -> tuple[float, float]:
        """How far another order of the same rows moves gradient and loss, in bf16, relative; the largest of a few.

        Rows are dealt anew to the step's microbatches, so that each has other neighbours and another padding. The sum of cross-entropy is
        taken by itself, not through ``training_step``: a step that weighs its microbatches wrongly must not widen its own tolerance.
        """
        step = self.steps[0]
        deal = np.random.default_rng(0)
        counts = [self.accumulate, *([self.divisors[-1], self.accumulate] * _REORDERINGS)[:_REORDERINGS]]
        orders = [np.array(step), *(deal.permutation(step) for _ in range(_REORDERINGS))]
        with self.without_dropout(), self.showing("rounding", len(orders)):
            first, *others = [self._summed(order.tolist(), count) for order, count in zip(orders, counts, strict=True)]
        return (
            max(relative(one.gradient, first.gradient) for one in others),
            max(relative_loss(one.loss, first.loss) for one in others),
        )

    @cached_property
    def jitter(self) -> tuple[float, float]:
        """How far gradient and loss move when the adapter's values are a rounding off, in bf16, relative.

        That is next to nothing by itself, but numbers behind it then round otherwise, and in the end nearly all: as with other kernels,
        and as no reordering of rows shows.
        """
        step = self.steps[0]
        with self.without_dropout(), self.showing("rounding", 2):
            plain = self._summed(step, self.accumulate)
            with self._jittered():
                other = self._summed(step, self.accumulate)
        return relative(other.gradient, plain.gradient), relative_loss(other.loss, plain.loss)

    @contextmanager
    def _jittered(self) -> Iterator[None]:
        """Every value of the adapter off by at most one rounding."""
        values = self.module.flat.parameter.data
        before = values.clone()
        noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
        values.mul_(noise.mul_(2).sub_(1).mul_(_JITTER).add_(1).to(values.device))
        try:
            yield
        finally:
            values.copy_(before)

    def _summed(self, order: Sequence[int], count: int) -> Step:
        """Loss and gradient of the rows in this order, in parts of equally many rows."""
        size = self.data.global_batch_size // count
        tokens = int(self.data.train_set.targets[list(order)].sum())
        self.module.model.train()
        self.module.flat.zero_grad()
        loss = 0.0
        for start in range(0, len(order), size):
            microbatch = Microbatch(tuple((index,) for index in order[start : start + size]), tokens)
            batch: Any = move_data_to_device(self._collate(microbatch), self.outside.device)
            part = self.runner.cross_entropy_sum(batch) if self.runner else self.module.cross_entropy_sum(batch)
            (part / tokens).backward()
            loss += float(part.detach()) / tokens
        self._advance(1)
        return Step(loss, self.module.flat.gradient.clone())


def planned_steps(data: InstructionDataModule, rows: int | None) -> list[list[int]]:
    """The first optimizer steps of a run, as example indices: two, or as many as ``rows`` examples make, the last perhaps short."""
    size, dataset = data.global_batch_size, data.train_set
    plan = plan_epoch(dataset.lengths, size, data.seed, 0, data.group_by_length, dataset.parts)
    chosen = [index for step in plan for index in step][: 2 * size if rows is None else rows]
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]
