"""Starting work on several ranks: CPU processes of one machine that talk through gloo.

Two ways, for two kinds of test:

* ``Ranks``, mostly as the fixture ``two_ranks``: processes that stay, each a rank as ``torchrun`` would start it. What runs in them is a
  function of a test's module, so that it can plant a fault there: ``two_ranks.run(function, *arguments)`` calls it in every rank and
  gives what each returned. ``fit(arguments)`` is the function for a fit with nothing planted:
  ``two_ranks.run(fit, ddp_options(2, base, rows, root))`` gives each rank's ``Ended``.
* ``fit_on_ranks``: one command, as a user types it; it starts the other ranks. For what only whole processes show.

``forking.py`` has a third, for ranks that are to die.
"""

import contextlib
import io
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forked import FORKED

SECONDS = 300.0
"""What any work of these tests may take at most, on a machine that others load or that stands still for a while."""


class Ended(NamedTuple):
    """How a command ended on one rank."""

    code: int
    err: str
    """All that it wrote to standard error."""

    @property
    def last_line(self) -> str:
        return self.err.strip().split("\n")[-1]


class Ranks:
    """Processes of one group that do what they are told, one thing after another.

    They are for numbers, not for faults: a rank that stands still for minutes, with its machine perhaps, is waited for. Work that fails or
    hangs in one rank ends all of them, and so does a rank that dies; the next work gets new ones.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._pools: list[ProcessPoolExecutor] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """Call ``function(*arguments)`` in every rank at once; what each gave, in order of ranks. All of it must pickle.

        Raises:
            AssertionError: a rank raised, died, or was not done after ``seconds``; with its traceback.
        """
        try:
            futures = self._submit(function, *arguments)
        except BrokenProcessPool:  # a rank died after its last work was done
            self.close()
            futures = self._submit(function, *arguments)
        done, late = wait(futures, seconds, FIRST_EXCEPTION)
        failed = {rank: one.exception() for rank, one in enumerate(futures) if one in done and one.exception() is not None}
        if failed or late:
            self.close()
            said = "".join(f"\nrank {rank}: {''.join(traceback.format_exception(error))}" for rank, error in failed.items())
            raise AssertionError(f"ranks {[futures.index(one) for one in late]} were not done after {seconds} s{said}")
        return [one.result() for one in futures]

    def close(self) -> None:
        """End the processes, whatever they do."""
        for pool in self._pools:
            for process in (getattr(pool, "_processes", None) or {}).values():
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools = []

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> list[Future[Any]]:
        if not self._pools:
            port = free_port()
            self._pools = [ProcessPoolExecutor(1, FORKED, _become, (rank, self.ranks, port)) for rank in range(self.ranks)]
        return [pool.submit(function, *arguments) for pool in self._pools]


def _become(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun sets, and take nobody for dead or for hanging before the test does."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    from qlora_lightning import rollcall
    from qlora_lightning.callbacks.rank_watch import RankWatch

    torch.set_num_threads(1)
    rollcall.SILENT_SECONDS = rollcall.STORE_SECONDS = rollcall.FAREWELL_SECONDS = 2 * SECONDS
    rollcall.BEAT_SECONDS = 0.05  # what waits for others looks a few times in this
    RankWatch._limit = lambda self: None  # type: ignore[method-assign,assignment,return-value]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def fit(arguments: Sequence[str]) -> Ended:
    """In a rank: ``qlora-lightning`` with ``arguments``, the command first."""
    from qlora_lightning.cli import main

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, err.getvalue())


def ddp_options(ranks: int, base: Path, rows: Path, root: Path, *options: str) -> list[str]:
    """A ``fit`` of ``running.base_options`` on ``ranks`` ranks; options are ``name=value`` strings. One rank has ``strategy: qlora``."""
    from running import base_options

    strategy = [] if ranks == 1 else ["--trainer.devices", str(ranks), "--trainer.strategy", "qlora_ddp"]
    given = [part for option in options for part in (f"--{option.partition('=')[0]}", option.partition("=")[2])]
    return ["fit", *base_options(base, rows, root), *strategy, *given]


def fit_on_ranks(
    ranks: int, *options: str, base: Path, rows: Path, root: Path, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run the same fit as a user starts it: one command, which starts the other ranks by itself.

    Args:
        ranks: The trainer's devices.
        options: ``name=value`` strings.
        base: The base model's folder.
        rows: Training rows.
        root: The run folder.
        seconds: After so long the command is killed, and subprocess.TimeoutExpired raised.

    Returns:
        Exit code, and both outputs of all ranks together.
    """
    command = [sys.executable, "-m", "qlora_lightning.cli", *ddp_options(ranks, base, rows, root, *options)]
    return subprocess.run(command, env=of_no_rank(), capture_output=True, text=True, timeout=seconds)


def of_no_rank() -> dict[str, str]:
    """This process's environment, for a command that is to start ranks."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_RANK} | {"GLOO_SOCKET_IFNAME": "lo"}


OF_A_RANK = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
"""What a process is told that somebody starts as a rank."""
