"""The whole plan of a fit: what it does, whether it works, what it takes where, and what to change."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.fused.budget import GIB
from qlora_lightning.modeling.positions import positions_of
from qlora_lightning.module import QLoRAModule
from qlora_lightning.optim import describe_optimizer
from qlora_lightning.plan.advice import Change, changes
from qlora_lightning.plan.checks import problems
from qlora_lightning.plan.communication import Traffic
from qlora_lightning.plan.cost import disk_of, estimated_seconds
from qlora_lightning.plan.fleet import ALONE, Fleet
from qlora_lightning.plan.longest import Ahead, Longest, bound, length_limit, look_ahead
from qlora_lightning.plan.memory import ADAPTER, CONSTANTS, GATHERED, GRADIENT, LINEAR, MODES, OTHERS, Forecast, MemoryPlan, Step
from qlora_lightning.plan.run import checkpointing, plan_run
from qlora_lightning.plan.target import Target, share_of_host, this_device


@dataclass(frozen=True)
class Saves:
    """What the recipe says of checkpoints."""

    every_n_steps: int
    keep: int


class Outlook:
    """The plan of a fit whose data is set up; nothing of it needs weights.

    Args:
        trainer: of the fit.
        module: of the fit.
        data: set up for it.
        saves: its checkpoints.
        targets: devices to plan for; the first says whether the fit fits, unless there are several: then one that it fits is enough.
        fleet: how many of them train together, whatever the trainer's.

    Raises:
        UserError: the recipe does not fit the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: QLoRAModule,
        data: InstructionDataModule,
        saves: Saves,
        targets: list[Target],
        fleet: Fleet = ALONE,
    ) -> None:
        self._trainer, self._module, self._data, self.fleet = trainer, module, data, fleet
        self.forecast = Forecast(module, fleet=fleet)
        self.ahead: Ahead | None = None if data.streaming else look_ahead(trainer, data, ranks=fleet.ranks)
        self.longest: Longest = self.ahead.longest if self.ahead else streamed_bound(trainer, data, self.forecast)
        self.plans = [self.forecast.on(target, module.policy, self.longest) for target in targets]
        self.disk = disk_of(Path(trainer.default_root_dir), saves.every_n_steps, saves.keep, trainer, data, self.plans[0])
        self.problems = problems(trainer, module, data, self.forecast, self.disk)

    @property
    def fits(self) -> bool:
        """Whether there is memory for it on one of the devices."""
        return any(plan.fits for plan in self.plans)

    @cached_property
    def changes(self) -> list[Change]:
        """What would make it fit the largest of the devices where it fits none."""
        if self.fits:
            return []
        largest = max(self.plans, key=lambda plan: plan.target.total).target
        accumulate = self._trainer.accumulate_grad_batches
        return changes(self.forecast, largest, self._module.policy, self._data, accumulate, self.longest)

    @property
    def seconds(self) -> float | None:
        """Of the steps, estimated for the first device; None where that is not known."""
        plan = self.plans[0]
        if self.ahead is None:
            return None
        alone = estimated_seconds(plan, self.forecast.fused(plan.target.cuda), self.ahead, self._module.compute == "fp8")
        return None if alone is None else alone + self.ahead.steps * self.traffic.step_seconds

    @property
    def traffic(self) -> Traffic:
        """What the devices send each other."""
        plan = self.plans[0]
        return Traffic(self.fleet, plan.parts[GRADIENT], plan.linear // 2)

    def lines(self) -> dict[str, Any]:
        """What the run does, name -> text."""
        run = plan_run(self._trainer, self._module, self._data, self.fleet) | self._device_lines()
        longest = self.longest
        if self.ahead:
            run["tokens in all"] = f"{self.ahead.tokens:,}, {self.ahead.supervised:,} of them supervised"
        kind = "longest microbatch" if longest.known else "longest microbatch there can be"
        run[kind] = f"{longest.rows} x {longest.width:,} tokens"
        return run | (traffic_lines(self.traffic) if self.fleet.ranks > 1 else {})

    def _device_lines(self) -> dict[str, str]:
        """What ``plan_run`` says of this machine's device, for a device that is elsewhere."""
        plan, policy = self.plans[0], self._module.policy
        if plan.target.here:
            return {}
        gpu = torch.device("cuda")
        return {
            "device": f"{plan.target.name}, computing in {str(self.forecast.dtype(True)).removeprefix('torch.')}",
            "blocks": f"transformers' own ({plan.not_fused})" if plan.not_fused else "fused",
            "optimizer": describe_optimizer(policy, gpu),
            "checkpointing": checkpointing(policy, fused=plan.not_fused is None),
        }

    def document(self) -> dict[str, Any]:
        """All of it, as plain values; memory in bytes."""
        return {
            "run": self.lines(),
            "steps": self._data.total_steps,
            "tokens": self.ahead and self.ahead.tokens,
            "supervised_tokens": self.ahead and self.ahead.supervised,
            "longest_microbatch": {"rows": self.longest.rows, "tokens_a_row": self.longest.width, "known": self.longest.known},
            "ranks": self.fleet.ranks,
            "communication": {"all_reduced_a_step": self.traffic.gradient, "gathered_a_microbatch": self.traffic.gathered},
            "memory": [_memory(plan) for plan in self.plans],
            "seconds_estimated": self.seconds,
            "disk": {
                "checkpoint": self.disk.checkpoint,
                "adapter": self.disk.adapter,
                "at_most": self.disk.total,
                "free": self.disk.free,
            },
            "problems": self.problems,
            "fits": self.fits,
            "changes": [{"options": one.options, "peak": one.peak, "note": one.note} for one in self.changes],
        }


def memory_lines(trainer: Trainer, module: QLoRAModule, data: InstructionDataModule) -> dict[str, str]:
    """The plan of memory before a fit in two lines; of transformers' own blocks only what is there before a step, which costs no time.

    Raises:
        UserError: the recipe does not fit the model.
    """
    fleet = Fleet.of(trainer)
    forecast, target = Forecast(module, fleet=fleet), share_of_host(this_device(trainer.strategy.root_device), fleet.devices)
    longest = streamed_bound(trainer, data, forecast) if data.streaming else look_ahead(trainer, data, 1, fleet.ranks).longest
    fused = not isinstance(forecast.fused(target.cuda), str)
    plan = forecast.on(target, module.policy, longest if fused else None)
    frozen = sum(plan.parts.get(part, 0) for part in (LINEAR, CONSTANTS, OTHERS, GATHERED))
    trained = plan.parts[ADAPTER] + plan.parts[GRADIENT] + plan.state
    lines = {
        "memory before a step": f"{frozen / GIB:.2f} GiB frozen weights, {trained / GIB:.2f} GiB adapter, gradient, optimizer's state",
        "longest microbatch": f"{longest.rows} x {longest.width:,} tokens",
    }
    if fused:
        lines["longest microbatch"] += f", {plan.step.peak / GIB:.1f} of {target.total / GIB:.1f} GiB planned: {plan.step.blocks}"
    return lines


def traffic_lines(traffic: Traffic) -> dict[str, str]:
    """What is sent, and for how long at the link's full speed."""
    link = traffic.link
    speed = f"at {link.bytes_per_second / 1e9:g} GB/s ({link.name})"
    lines = {"a step adds up": f"{traffic.gradient / GIB:.3f} GiB of gradient over devices: {traffic.step_seconds * 1e3:,.1f} ms {speed}"}
    if traffic.gathered:
        lines["a microbatch gathers"] = f"{traffic.gathered / GIB:.2f} GiB of weights: {traffic.microbatch_seconds * 1e3:,.1f} ms {speed}"
    return lines


def streamed_bound(trainer: Trainer, data: InstructionDataModule, forecast: Forecast) -> Longest:
    """The longest microbatch that a stream can give: its lengths are not known, their limit is."""
    rows = data.global_batch_size // (trainer.accumulate_grad_batches * forecast.fleet.ranks)
    limit = length_limit(data.spec) or positions_of(forecast.config) or data.packed_row
    return bound(rows, data.packed_row if data.packing else limit)


def _memory(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "device": plan.target.name,
        "total": plan.target.total,
        "usable": plan.budget.free + plan.budget.held,
        "parts": plan.parts,
        "allocated_before_a_step": plan.allocated,
        "checkpointing": plan.mode,
        "modes": {mode: _step(plan.steps[mode]) for mode in MODES if mode in plan.steps},
        "fused": plan.not_fused is None,
        "fits": plan.fits,
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "kept": step.kept,
        "working": step.working,
        "weights_in_16_bits": step.weights,
        "peak": step.peak,
        "fits": step.fits,
        "blocks": step.blocks,
        "optimizer_on_host": step.paged_out,
    }
