"""Two ranks of a fit, as processes forked from one that has imported everything: a start costs a second and not ten.

For launching, and for what ends processes. They write to files of their own, and what happens in them can be planted: a function of a
test's module that is called there first, with a number. Who waits to find out that another is gone waits for less than a user's run does.
"""

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forked import FORKED
from running import base_options
from starting import OF_A_RANK, free_port

from qlora_lightning import rollcall
from qlora_lightning.cli import main

SECONDS = 120.0
"""In which all must have ended."""


class Ended(NamedTuple):
    """How a rank ended."""

    code: int | None
    err: str

    @property
    def lines(self) -> list[str]:
        """Of an error; progress and warnings left out."""
        return [line for line in self.err.splitlines() if line.startswith("qlora-lightning:")]


def torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def _begin_together() -> None:
    """Let no rank go on before the other has come, which looks for the first one once a second: a wrong option ends that one sooner."""
    begin = rollcall.begin

    def beginning(*arguments: Any) -> rollcall.RollCall:
        call = begin(*arguments)
        call.meet("begun")
        return call

    rollcall.begin = beginning


def _be(
    environment: dict[str, str], arguments: list[str], plant: tuple[Callable[[int], None], int] | None, err: Path, python: bool
) -> None:
    """In a process of its own: a rank, as the command line or as ``main`` called from Python."""
    for name in OF_A_RANK:
        os.environ.pop(name, None)
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  (until the end)
    torch.set_num_threads(1)
    rollcall.BEAT_SECONDS, rollcall.SUSPECT_SECONDS, rollcall.GRACE_SECONDS = 0.1, 2.0, 1.0
    if environment:  # else this one starts the other, as a fresh process
        _begin_together()
    if plant is not None:
        function, where = plant
        function(where)
    sys.argv = ["python", "no", "such", "command"] if python else ["qlora-lightning", *arguments]
    code = main(arguments if python else None)
    sys.stderr.flush()
    sys.exit(code)


class Start(NamedTuple):
    """Starts two ranks of a fit; options are ``name=value`` strings."""

    base: Path
    rows: Path
    folder: Path
    environment: Callable[[int, int], dict[str, str]] = torchrun
    """What is set for a rank, by its number and a free port."""

    @property
    def root(self) -> Path:
        return self.folder / "run"

    def __call__(
        self, *options: str, plant: tuple[Callable[[int], None], int] | None = None, of_rank_1: tuple[str, ...] = ()
    ) -> list[Ended]:
        port, errors = free_port(), [self.folder / f"rank{rank}.err" for rank in range(2)]
        processes = []
        for rank, own in enumerate(((), of_rank_1)):
            arguments = self.arguments(*options, *own)
            processes.append(FORKED.Process(target=_be, args=(self.environment(rank, port), arguments, plant, errors[rank], False)))
        for process in processes:
            process.start()
        until = time.monotonic() + SECONDS
        for process in processes:
            process.join(until - time.monotonic())
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return [Ended(code, file.read_text(errors="replace")) for code, file in zip(codes, errors, strict=True)]

    def launch(self, *options: str, python: bool = False) -> BaseProcess:
        """Begin one command on two devices, which starts the other rank itself, as a fresh process; ``err`` of the folder is theirs."""
        arguments = self.arguments("trainer.devices=2", *options)
        process = FORKED.Process(target=_be, args=({}, arguments, None, self.folder / "err", python))
        process.start()
        return process

    def arguments(self, *options: str) -> list[str]:
        """Of a fit that saves every step."""
        given = [part for option in options for part in (f"--{option.partition('=')[0]}", option.partition("=")[2])]
        return ["fit", *base_options(self.base, self.rows, self.root), "--checkpoint.every_n_steps", "1", *given]
