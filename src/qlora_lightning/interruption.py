"""Ctrl-C, SIGTERM and a scheduler's wish to requeue: what ends a run from outside, and the command that goes on with it.

A signal ends what is going on at once. Only while a fit trains is it kept until the step is whole: see ``callbacks/stop.py``.
"""

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qlora_lightning.console import say
from qlora_lightning.redaction import redacted

OF_ONE_START = ("--ckpt_path", "--overwrite")
"""Options that belong to one start of a run and not to the run."""
SCONTROL_SECONDS = 60.0


class Interrupted(SystemExit):
    """A signal ends the run; the exit code is that of a process which the signal ended (128 + its number).

    Args:
        number: The signal.
        step: The optimizer step that has just ended, where the state is whole and can be saved; None in the middle of anything else.
        job: SLURM job to put back into the queue.
    """

    def __init__(self, number: int, step: int | None = None, job: str | None = None) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.step = step
        self.job = job
        self.checkpoint: Path | None = None
        """Where a fit that has begun keeps its last checkpoint, once there is one."""

    def __str__(self) -> str:
        """The signal in words."""
        return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name


def interruptible(arguments: list[str], work: Callable[[], None]) -> None:
    """Do ``work``; when a signal ends it, say so, with the command that goes on, and leave with the signal's exit code.

    Args:
        arguments: Of the command line, the command first.
        work: What the command does.
    """
    try:
        with ending_on(signal.SIGINT, signal.SIGTERM):
            work()
    except Interrupted as end:
        say(_last_line(end, arguments))
        if end.job is not None:
            _requeue(end.job)
        raise


@contextmanager
def ending_on(*numbers: signal.Signals) -> Iterator[None]:
    """Within this, each of these signals raises ``Interrupted``; one that the process was started to ignore stays ignored."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may
        before = {one: handler for one in numbers if (handler := signal.getsignal(one)) != signal.SIG_IGN}
    for one in before:
        signal.signal(one, end_now)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def end_now(number: int, _: FrameType | None) -> None:
    """Handler of a signal that ends whatever is going on."""
    raise Interrupted(number)


def _last_line(end: Interrupted, arguments: list[str]) -> str:
    """What has ended, and how to go on: from the checkpoint, or from the beginning where there is none."""
    if arguments[0] != "fit":
        return f"Stopped by {end}"
    if end.checkpoint is None:
        return f"Stopped by {end} before training began; begin with: {command_line(arguments)}"
    if end.checkpoint.is_file():
        where = f"after step {end.step}, which is saved" if end.step else "at once; what came after the last checkpoint runs again"
        return f"Stopped by {end} {where}; go on with: {command_line(resuming(arguments))}"
    again = arguments if "--overwrite" in " ".join(arguments) else [*arguments, "--overwrite", "true"]
    return f"Stopped by {end} before there was a checkpoint; begin anew with: {command_line(again)}"


def resuming(arguments: list[str]) -> list[str]:
    """``arguments`` of a fit, made to go on where its last checkpoint stands."""
    kept, rest = [], list(arguments)
    while rest:
        part = rest.pop(0)
        option, equals, _ = part.partition("=")
        if option not in OF_ONE_START:
            kept.append(part)
        elif not equals and rest and not rest[0].startswith("--"):
            rest.pop(0)  # its value
    return [*kept, "--ckpt_path", "last"]


def command_line(arguments: list[str]) -> str:
    """The command line with ``arguments``, to be pasted into a shell; without secrets."""
    name = Path(sys.argv[0]).name
    program = [name] if name == "qlora-lightning" else [sys.executable, "-m", "qlora_lightning.cli"]
    return shlex.join(redacted(part) for part in [*program, *arguments])


def _requeue(job: str) -> None:
    """Put a SLURM job back into the queue."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_SECONDS)
        trouble = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = str(error)
    say(f"warning: job {job} is not requeued ({trouble}); submit it again" if trouble else f"Requeued job {job}")
