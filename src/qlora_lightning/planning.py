"""``plan``: what a fit will do, what it takes, and whether it fits, before any weight is loaded."""

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_lightning.errors import UserError
from qlora_lightning.lightning_cli import QLoRACLI, resolve_names
from qlora_lightning.measuring import Measured, measure
from qlora_lightning.parser import OneLineParser, without
from qlora_lightning.plan.advice import Change, least_gib
from qlora_lightning.plan.fleet import one_device_of
from qlora_lightning.plan.memory import MODES, MemoryPlan
from qlora_lightning.plan.outlook import Outlook, Saves
from qlora_lightning.plan.run import plan_table
from qlora_lightning.plan.target import SIZES, gpu_of, share_of_host, this_device
from qlora_lightning.recipes import shared_defaults
from qlora_lightning.run_folder import named_folder

GIB = 2**30
_DESCRIPTION = (
    "Say what a fit will do, what it takes of memory, time and disk, and whether that fits. Of the base model only config.json and "
    "tokenizer are read (a .gguf file is converted first, once). Besides the options below every option of `fit` is understood and means "
    "the same: --config RECIPE, --model.base_model, --data.dataset.path FILE and all others that `qlora-lightning fit --help` lists. "
    "Exit code 2: it cannot work or does not fit; the lines say what to change."
)
_GPU_GIB = (
    "Plan for a GPU of so many GiB instead of this machine's device. Without it, a machine that has no GPU also shows the sizes "
    f"{', '.join(map(str, SIZES))}."
)
_MEASURE = (
    "Load the model and train on the longest step for real, a few times, save and reload, in a temporary folder; say what was measured "
    "beside what was planned."
)
_JSON = "Print the plan as one JSON document on standard output, and all else on standard error."


def plan(options: list[str]) -> int:
    """Run the command; gives the exit code.

    Raises:
        UserError: options, recipe or data are wrong, or the fit cannot work or does not fit.
    """
    if {"--help", "-h"} & {*options}:
        _print_help()
        return 0
    cli = PlanCLI(options)
    outlook = cli.outlook()
    wanted = cli.given.measure and outlook.fits and not outlook.problems  # else the lines below say why it would fail
    measured = measure(cli.of_fit, outlook, cli.datamodule, cli.trainer) if wanted else None
    if cli.given.json:
        print(json.dumps(outlook.document() | ({"measured": measured.document()} if measured else {})))
    else:
        show(Console(highlight=False), outlook, measured)
    _complain(outlook)
    return 0


class PlanCLI(QLoRACLI):
    """Parses the options of a fit and of the plan, and builds Trainer, module and data; makes no run folder and no logger.

    Attributes:
        given: the parsed options.
        of_fit: the options among those given that a fit understands.
        fleet: the devices that they ask for; Trainer and all else are built for one of them.
    """

    def __init__(self, options: list[str]) -> None:
        command, *resolved = resolve_names(["fit", *options])
        self.of_fit = without(options, ("--gpu_gib", "--gpu-gib", "--measure", "--json"))
        super().__init__([command, "--config", str(shared_defaults()), *resolved])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        _add_options(parser)

    def before_instantiate_classes(self) -> None:
        """Nothing of a run is made or looked for."""
        self.given: Namespace = self.config[self.subcommand]
        gib = self.given.gpu_gib
        if gib is not None and gib <= 0:
            raise UserError(f"--gpu-gib must be above 0, got {gib:g}; give the size of a GPU in GiB")
        if gib is not None and self.given.measure:
            raise UserError(f"--measure measures this machine's device, but --gpu-gib {gib:g} is given; leave one of them out")
        if gib is not None:
            self.given.trainer.accelerator = "auto"  # its devices need not be here
        self.fleet = one_device_of(self.given)
        if self.fleet.ranks > 1 and self.given.measure:
            raise UserError(
                f"--measure measures a step of one device, but there are {self.fleet.ranks}; add --trainer.devices 1 --trainer.num_nodes 1 "
                f"--trainer.accumulate_grad_batches N, where N is {self.fleet.ranks} times the fit's"
            )
        self.given.trainer.default_root_dir = str(named_folder(self.given))
        self.given.ckpt_path = None
        self._continues = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return LightningCLI.instantiate_trainer(self, logger=False, **kwargs)

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        self.datamodule.check(self.trainer.accumulate_grad_batches, self.fleet.ranks)
        self.datamodule.setup("fit")
        self.datamodule.trainer = self.model.trainer = self.trainer

    def outlook(self) -> Outlook:
        """The plan, for the devices that are asked about."""
        device = self.trainer.strategy.root_device
        here = share_of_host(this_device(device), self.fleet.devices)
        if self.given.gpu_gib is not None:
            targets = [gpu_of(self.given.gpu_gib)]
        elif device.type == "cuda" or self.given.measure:
            targets = [here]
        else:
            targets = [here, *map(gpu_of, SIZES)]
        saves = Saves(self.given.checkpoint.every_n_steps, self.given.checkpoint.keep)
        return Outlook(self.trainer, self.model, self.datamodule, saves, targets, self.fleet)

    def _run_subcommand(self, subcommand: str) -> None:
        """There is nothing to run."""


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--gpu-gib", type=float | None, default=None, help=_GPU_GIB)
    parser.add_argument("--measure", type=bool, default=False, help=_MEASURE)


def _print_help() -> None:
    parser = OneLineParser(prog="qlora-lightning plan", description=_DESCRIPTION)
    _add_options(parser)
    parser.add_argument("--json", type=bool, default=False, help=_JSON)
    parser.print_help()


def _complain(outlook: Outlook) -> None:
    """End with exit code 2 where the plan cannot be carried out."""
    if outlook.problems:
        more = f" (and {len(outlook.problems) - 1} more problems above)" if len(outlook.problems) > 1 else ""
        raise UserError(f"the plan cannot be carried out: {outlook.problems[0]}{more}")
    if not outlook.fits:
        largest = max(outlook.plans, key=lambda plan: plan.target.total)
        ways = [_option_text(change) for change in outlook.changes]
        way = f"try {' or '.join(ways)}" if ways else f"it needs a GPU of {least_gib(largest)} GiB or a smaller base model"
        raise UserError(
            f"the fit needs {largest.step.peak / GIB:.1f} GiB, and {largest.target.name} has {_usable(largest) / GIB:.1f} for it; {way}"
        )


# ---- for the terminal ----


def show(out: Console, outlook: Outlook, measured: Measured | None) -> None:
    """Print the plan, and what was measured."""
    out.print(plan_table(outlook.lines() | _cost_lines(outlook, measured)), "")
    first, *others = outlook.plans
    out.print(_memory_table(first), "")
    if others:
        out.print(_sizes_table(others), "")
    if measured:
        out.print(measured.table(), "")
    for change in outlook.changes:
        note = f" ({change.note})" if change.note else ""
        out.print(escape(f"fits with {_option_text(change)}: {change.peak / GIB:.1f} GiB{note}"), soft_wrap=True)
    for problem in outlook.problems:
        out.print(escape(f"problem: {problem}"), soft_wrap=True)


def _cost_lines(outlook: Outlook, measured: Measured | None) -> dict[str, str]:
    disk = outlook.disk
    seconds = measured.run_seconds(outlook.ahead) if measured and outlook.ahead else outlook.seconds
    how = "at the speed of the step that was measured" if measured else "estimated; --measure measures it"
    return {
        "time of the steps": f"{_duration(seconds)}, {how}" if seconds else "unknown on this device; --measure measures it",
        "checkpoints": f"at most {disk.count} of {disk.checkpoint / GIB:.2f} GiB, each with an adapter folder of "
        f"{disk.adapter / GIB:.2f} GiB: {disk.total / GIB:.2f} of {disk.free / GIB:,.0f} GiB free",
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _memory_table(plan: MemoryPlan) -> Table:
    """Bytes before a step, and a step's by mode."""
    headings = [_heading(plan, mode) for mode in MODES]
    table = Table("GiB", *headings, title=f"Memory on {escape(plan.target.name)}", title_justify="left", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part, size in plan.parts.items():
        table.add_row(part, *[_gib(size)] * len(MODES))
    table.add_section()
    steps = [plan.steps.get(mode) for mode in MODES]
    table.add_row("kept by blocks for backward", *(_gib(step.kept) if step else "-" for step in steps))
    table.add_row("logits and other work", *(_gib(step.working) if step else "-" for step in steps))
    if any(step.weights for step in steps if step):
        table.add_row("weights kept in 16 bits", *(_gib(step.weights) if step else "-" for step in steps))
    table.add_row("peak", *(_gib(step.peak) if step else "-" for step in steps))
    table.add_row(f"fits {_usable(plan) / GIB:.1f}", *("no" if step is None or not step.fits else "yes" for step in steps))
    table.caption, table.caption_justify = escape(_caption(plan)), "left"
    return table


def _heading(plan: MemoryPlan, mode: Any) -> str:
    return f"{mode} (the recipe's)" if mode == plan.mode else str(mode)


def _caption(plan: MemoryPlan) -> str:
    path = "transformers' blocks" if plan.not_fused else "fused path"
    said = [f"{mode}: {plan.steps[mode].blocks}" for mode in MODES if mode in plan.steps]
    out = ["the optimizer's state waits in host memory, which takes time at each update"] if plan.step.paged_out else []
    return "; ".join([path, *said, *out])


def _sizes_table(plans: list[MemoryPlan]) -> Table:
    table = Table("GPU, GiB", "peak, GiB", "fits", "blocks", title="On a GPU", title_justify="left", pad_edge=False)
    for plan in plans:
        blocks = plan.step.blocks + ("; the optimizer's state on the host" if plan.step.paged_out else "")
        table.add_row(f"{plan.target.total / GIB:g}", _gib(plan.step.peak), "yes" if plan.fits else "no", blocks)
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}"


def _usable(plan: MemoryPlan) -> int:
    return plan.budget.free + plan.budget.held


def _option_text(change: Change) -> str:
    return " ".join(f"--{name} {value}" for name, value in change.options.items())
