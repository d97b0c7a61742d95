"""``verify``: is training exact with this recipe, on this model, these rows and this machine? See ``verify/`` for the checks."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from qlora_lightning.callbacks.announce import Announce
from qlora_lightning.callbacks.samples import Samples
from qlora_lightning.callbacks.stop import StopBetweenSteps
from qlora_lightning.console import say
from qlora_lightning.data.stream import BEGINNING
from qlora_lightning.errors import UserError
from qlora_lightning.lightning_cli import QLoRACLI, resolve_names
from qlora_lightning.parser import OneLineParser, without
from qlora_lightning.recipes import shared_defaults
from qlora_lightning.run_folder import find_checkpoint
from qlora_lightning.verify import gradients
from qlora_lightning.verify.checks import CHECKS, chosen_checks
from qlora_lightning.verify.labels import labels
from qlora_lightning.verify.outcome import BITS, Findings, Outcome, carry_out, table
from qlora_lightning.verify.ranks import ranks
from qlora_lightning.verify.reload import reload
from qlora_lightning.verify.resumption import resumption
from qlora_lightning.verify.step import Outside, prepare, wake
from qlora_lightning.verify.subject import Subject, planned_steps

STEPS, STOP = 4, 2
"""Optimizer steps of the runs that are compared, and after how many the second is resumed."""
_OWN = ("--checks", "--rows")
_DESCRIPTION = (
    "Check that training is exact on a slice of your own rows, with your own model, settings and machine. Besides the options below every "
    "option of `fit` is understood and means the same. Checks: " + "; ".join(f"{name} - {what}" for name, what in CHECKS.items()) + ". "
    "Exit code 2 when one fails."
)
_CHECKS = "Which checks to make, separated by commas. Default: all."
_ROWS = "Examples to look at, the first of the run's plan. Default: two optimizer steps' worth."
_JSON = "Print one JSON document on standard output and all else on standard error."


def verify(arguments: list[str]) -> int:
    """Make the checks of the fit that ``arguments`` describe; gives the exit code.

    Raises:
        UserError: options, rows or files are wrong, or a check failed.
    """
    if {"--help", "-h"} & {*arguments}:
        _print_help()
        return 0
    with tempfile.TemporaryDirectory(prefix="qlora-lightning-verify-", ignore_cleanup_errors=True) as folder:
        verification = Verification(arguments, Path(folder))
        outcomes = verification.run()
    failed = [outcome.check for outcome in outcomes if outcome.verdict == "failed"]
    if verification.cli.given.json:
        print(json.dumps(verification.document(outcomes)))
    else:
        Console(highlight=False).print(table(outcomes))
    if failed:
        raise UserError(
            f"verify: {', '.join(failed)} failed, so that a fit would not be what its recipe says; docs/verify.md says what to do"
        )
    return 0


class VerificationCLI(QLoRACLI):
    """Parses the options of a fit and of the verification, and builds what a short run of that fit needs; runs nothing.

    Args:
        options: the user's.
        root: the run folder.

    Attributes:
        given: the parsed options.
        checks: which to make.
    """

    def __init__(self, options: list[str], root: Path) -> None:
        command, *resolved = resolve_names(["fit", *options])
        self.root = root
        super().__init__([command, "--config", str(shared_defaults()), *resolved, *run_options(root)])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        _add_options(parser)

    def before_instantiate_classes(self) -> None:
        """The user's own run folder is neither read nor written; an adapter to start from is."""
        self.root.mkdir(parents=True)
        self.given = self.config[self.subcommand]
        self.checks = chosen_checks(self.given.checks)
        if self.given.rows is not None and self.given.rows < 1:
            raise UserError(f"--rows must be 1 or more, got {self.given.rows}; leave it out for two optimizer steps' worth")
        checkpoint, self.initial_adapter = find_checkpoint(self.given.ckpt_path, self.root, required=True)
        if checkpoint is not None:
            raise UserError(f"verify starts anew or from an adapter folder, got --ckpt_path {checkpoint}; give the folder beside it")
        self.given.ckpt_path = None
        self._continues = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # They speak of a run that stays, or would keep it for later when it is interrupted.
        callbacks[:] = [one for one in callbacks if not isinstance(one, Announce | Samples | StopBetweenSteps)]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: what runs, and when, is the verification's to say."""


def run_options(root: Path) -> list[str]:
    """What a short run adds to the options of its fit: where it is, how long, and that it is not validated or logged."""
    options = {
        "trainer.default_root_dir": root,
        "trainer.max_steps": STEPS,
        "trainer.max_epochs": -1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "false",
        "checkpoint.every_n_steps": STOP,
        "checkpoint.keep": STEPS,
        "samples.count": 0,
        "overwrite": "false",
    }
    return [f"--{name}={value}" for name, value in options.items()]


@dataclass
class Verification:
    """One verification, from parsed options to outcomes.

    Attributes:
        options: the user's.
        folder: for its runs and files, an empty one.
        fresh: resume in a new process; None decides by the memory that is free.
    """

    options: list[str]
    folder: Path
    fresh: bool | None = None

    def __post_init__(self) -> None:
        self.cli = VerificationCLI(self.options, self.folder / "whole")
        self.data = self.cli.datamodule
        self.data.setup("fit")
        if self.data.streaming:
            say(f"data.streaming is true: the first {BEGINNING:,} rows stand for all")
            self.data.train_set, self.data.train_report = self.data.sets[0].training
        self.steps = planned_steps(self.data, self.cli.given.rows)
        strategy: Any = self.cli.trainer.strategy
        self.outside = Outside(strategy.root_device, strategy.policy, self.data)

    def run(self) -> list[Outcome]:
        """All checks that are wanted, each said as it ends."""
        outcomes = []
        for number, check in enumerate(self.cli.checks, 1):
            say(f"[{number}/{len(self.cli.checks)}] {check}: {CHECKS[check]}")
            outcomes.append(carry_out(check, self._measures()[check]))
            say(f"[{number}/{len(self.cli.checks)}] {check}: {outcomes[-1].verdict} in {outcomes[-1].seconds:.1f} s")
        return outcomes

    def _measures(self) -> dict[str, Callable[[], Findings]]:
        on_subject: dict[str, Callable[[Subject], Findings]] = {
            "accumulation": gradients.accumulation,
            "packing": gradients.packing,
            "checkpointing": gradients.checkpointing,
            "fused": gradients.fused,
            "reload": partial(reload, folder=self.folder / "adapter"),
            "ranks": partial(ranks, folder=self._new_folder("ranks")),
        }
        made: dict[str, Callable[[], Findings]] = {name: partial(self._on_subject, check) for name, check in on_subject.items()}
        return made | {"labels": self._labels, "resume": self._resume}

    def _labels(self) -> Findings:
        return labels(self.data, [index for step in self.steps for index in step])

    def _on_subject(self, check: Callable[[Subject], Findings]) -> Findings:
        return check(self._subject())

    def _subject(self) -> Subject:
        """The model, loaded by the first check that needs it, with an adapter that does something."""
        if not hasattr(self, "_made"):
            prepare(self.cli.model, self.outside)
            wake(self.cli.model)
            accumulate = self.cli.trainer.accumulate_grad_batches
            self._made = Subject(self.cli.model, self.outside, self.data, accumulate, self.steps)
        return self._made

    def _new_folder(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    # ---- resume ----

    def _resume(self) -> Findings:
        """Two real fits: one of four steps, and one that begins behind its second from its checkpoint."""
        first = self.cli
        self._fit(first)
        _forget_optimizer(first.trainer)
        checkpoint = first.root / "checkpoints" / f"step-{STOP:08d}.ckpt"
        fresh = self._room_for_another() if self.fresh is None else self.fresh
        resumed = self.folder / "resumed"
        if fresh:
            self._in_a_new_process(resumed, checkpoint)
        else:
            self._in_this_process(resumed, checkpoint)
        subject = self._subject()
        found = resumption(first.root, resumed, STOP, BITS if subject.reproducible else subject.loss_bound)
        where = "in a new process" if fresh else "in this process, for lack of memory for a second one"
        return Findings(found.measured, "; ".join(part for part in (f"resumed {where}", found.note) if part))

    def _in_a_new_process(self, root: Path, checkpoint: Path) -> None:
        options = [*without(self.options, _OWN), *run_options(root), "--ckpt_path", str(checkpoint)]
        say(f"Resuming behind step {STOP} in a new process")
        ended = subprocess.run([sys.executable, "-m", "qlora_lightning.cli", "fit", *options], capture_output=True, text=True)
        if ended.returncode:
            *_, last = ["it said nothing", *ended.stderr.strip().splitlines()]
            raise UserError(f"the resumed fit ended with exit code {ended.returncode}: {last.removeprefix('qlora-lightning: ')}")

    def _in_this_process(self, root: Path, checkpoint: Path) -> None:
        """With the base that is loaded, and nothing else of the first run."""
        self.cli.model.flat.parameter.data.zero_()
        self._fit(VerificationCLI(self.options, root), checkpoint)

    def _fit(self, cli: VerificationCLI, checkpoint: Path | None = None) -> None:
        """A short run, of the one model that is loaded."""
        try:
            cli.trainer.fit(self.cli.model, datamodule=self.data, ckpt_path=checkpoint)
        except SystemExit as end:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from end

    def _room_for_another(self) -> bool:
        """Whether a second process finds the memory that this one has needed."""
        device = self.outside.device
        if device.type != "cuda":
            return True
        runner = self.cli.model._runner
        if runner is not None:
            runner.give_up_graphs(2**62)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] > 1.1 * torch.cuda.max_memory_allocated(device)

    # ---- results ----

    def document(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """All outcomes as plain values, with what they were found on."""
        module = self.cli.model
        return {
            "base_model": module.base_model,
            "device": str(self.outside.device),
            "compute": str(getattr(module, "_compute_dtype", module.compute)).removeprefix("torch."),
            "fused": module._runner is not None,
            "examples": sum(len(step) for step in self.steps),
            "global_batch_size": self.data.global_batch_size,
            "passed": all(outcome.verdict != "failed" for outcome in outcomes),
            "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
            "checks": [outcome.document() for outcome in outcomes],
        }


def _forget_optimizer(trainer: Trainer) -> None:
    """After a fit its state takes room that nothing needs any more; the schedule holds it too."""
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--checks", type=str | None, default=None, help=_CHECKS)
    parser.add_argument("--rows", type=int | None, default=None, help=_ROWS)


def _print_help() -> None:
    parser = OneLineParser(prog="qlora-lightning verify", description=_DESCRIPTION)
    _add_options(parser)
    parser.add_argument("--json", type=bool, default=False, help=_JSON)
    parser.print_help()
