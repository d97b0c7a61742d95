"""The ranks of a run know of each other through one store: who lives, where each stands in its step, and what went wrong first.

A rank that fails writes its line into the store, where the first line stays; that rank prints it, and the others end without a word of
the errors that followed from it. A thread in each rank shows that the rank lives; the first rank's judges who does not, and who keeps
the others waiting. The store is torch's, which the process group uses too, so there is no further port and no further service.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.console import console, harmless
from qlora_lightning.heartbeats import SILENT_SECONDS, SUSPECT_SECONDS, Beat, Heartbeats, ending
from qlora_lightning.redaction import redacted

BEAT_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""What a rank gets to end by itself when another one has failed; it may be waiting for that one in a collective that has no end."""
FAREWELL_SECONDS = 60.0
"""How long the first rank, which holds the store, waits at its end for the others'."""
STORE_SECONDS = 30.0
END = "end"
NOT_BEGUN = "before it had begun"


class Failure(NamedTuple):
    """What ended the run: the line that a user sees, and which rank prints it."""

    line: str
    by: int
    code: int


class Verdict(NamedTuple):
    """What a rank that has failed has to do."""

    line: str | None
    """To print; None where another rank prints it."""
    code: int
    own: bool
    """Whether the rank's own error is what ended the run."""


class RollCall:
    """One rank's side of it.

    Args:
        rank: Of this process, from 0.
        ranks: All of them.
        address: Host and port of the store; port 0 for a free one, of the first rank.
        hosts: Whether this process holds the store.
        way_on: How a user goes on after a failure.
        run: Which run of this process it is, where several have the same store.
    """

    def __init__(self, rank: int, ranks: int, address: tuple[str, int], hosts: bool, way_on: str, run: int = 0) -> None:
        from torch.distributed import TCPStore  # only now: commands of one process do not wait for torch

        self.rank, self.ranks, self.way_on = rank, ranks, way_on
        self._prefix = f"qlora-lightning/{run}"
        host, port = address
        waiting = timedelta(seconds=STORE_SECONDS)
        # multi_tenant: the process group that opens a store at this address afterwards gets this one
        self._store = TCPStore(host, port, is_master=hosts, wait_for_workers=False, multi_tenant=True, timeout=waiting)
        self.address = (host, self._store.port)
        self.limit_seconds: float | None = None
        """How long ranks may wait for another at the end of a step; None for no limit. Told by ``callbacks/rank_watch.py``."""
        self.mine = Beat(socket.gethostname())
        self.failure: Failure | None = None
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._heard = Heartbeats()
        self._suspecting = False
        self._said = False
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._attend, daemon=True, name="roll-call")
        self._thread.start()

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    # ---- what ranks tell each other ----

    def hand_on(self, name: str, value: Any) -> None:
        """Give ``value``, anything that JSON can hold, to the ranks that ask for it."""
        self._store.set(self._key(name), json.dumps(value))

    def receive(self, name: str) -> Any:
        """What a rank hands on under ``name``; waits for it as long as it takes."""
        self._await([name])
        return json.loads(self._store.get(self._key(name)))

    def meet(self, name: str) -> None:
        """Wait until every rank has come here, as long as it takes."""
        self.hand_on(f"{name}/{self.rank}", None)
        self._await([f"{name}/{rank}" for rank in range(self.ranks)])

    def _await(self, names: Sequence[str]) -> None:
        keys = [self._key(name) for name in names]
        while not self._store.check(keys):
            time.sleep(BEAT_SECONDS / 5)

    def at(self, step: int | None, arrived: bool = False) -> None:
        """Tell that this rank is in an optimizer step, or at its end where ranks wait for each other; None for neither."""
        self.mine.step, self.mine.arrived = step, arrived

    def attend_to(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Notice when ``process``, which this one has started as that rank, ends."""
        self._children[rank] = process

    # ---- the end ----

    def fail(self, line: str, code: int, follows: bool) -> Verdict:
        """Tell the others that this rank has failed, unless another one was first.

        Args:
            line: What is wrong.
            code: The exit code.
            follows: Whether the error is what a lost rank looks like from here; then its cause is waited for.
        """
        if follows:
            self._suspecting = True
            until = time.monotonic() + SILENT_SECONDS + 2 * BEAT_SECONDS
            while self._find_failure() is None and time.monotonic() < until:
                time.sleep(BEAT_SECONDS / 5)
        own = self._find_failure() is None
        failure = self._declare(self.rank, line, code)
        self._left.set()
        return Verdict(failure.line if self._mine_to_say(failure) else None, failure.code, own and failure.by == self.rank)

    def leave(self) -> int:
        """End this rank's part; the first one waits for the others. Gives the exit code of a failure of theirs, else 0."""
        self._left.set()
        self.mine.left = True
        seconds = FAREWELL_SECONDS if self.failure is None else 2 * GRACE_SECONDS
        until = time.monotonic() + seconds
        with suppress(RuntimeError):  # the first rank is gone
            self._beat()
            while self.rank == 0 and not all(self._is_gone(rank) for rank in range(1, self.ranks)) and time.monotonic() < until:
                time.sleep(BEAT_SECONDS / 5)
        failure = self._find_failure()
        self._thread.join()
        if self._children:
            self._end_children()
            _leave_group(failed=failure is not None)
        return failure.code if failure else 0

    def _is_gone(self, rank: int) -> bool:
        child = self._children.get(rank)
        if child is not None:
            return child.poll() is not None
        beat = self._read(rank)
        return beat is None or beat.left

    def _end_children(self) -> None:
        for child in self._children.values():
            child.kill()  # nothing to those that have ended
            child.wait()

    def _declare(self, rank: int, line: str, code: int) -> Failure:
        """Write down that ``rank`` has failed; gives what was written first."""
        failure = Failure(f"{self.name(rank)}: {line}", self.rank, code)
        with self._lock:
            if self.failure is None:
                try:
                    self.failure = Failure(*json.loads(self._store.compare_set(self._key(END), "", json.dumps(failure))))
                except RuntimeError:
                    self.failure = self._store_lost()
        return self.failure

    def _find_failure(self) -> Failure | None:
        try:
            if self.failure is None and self._store.check([self._key(END)]):
                self.failure = Failure(*json.loads(self._store.get(self._key(END))))
        except RuntimeError:
            if not self.mine.left:
                self.failure = self._store_lost()
        return self.failure

    def _store_lost(self) -> Failure:
        """The store ends with the first rank; of those left, one says so."""
        return Failure(f"{self.name(0)}: it is gone, {self._heard.last.get(0) or NOT_BEGUN}; {self.way_on}", 1, 2)

    def name(self, rank: int) -> str:
        """``rank 2 of 4 (node a)``; the node where it is known."""
        beat = self.mine if rank == self.rank else self._heard.last.get(rank)
        return f"rank {rank} of {self.ranks}" + (f" (node {beat.node})" if beat else "")

    def _mine_to_say(self, failure: Failure) -> bool:
        with self._lock:
            mine, self._said = failure.by == self.rank and not self._said, True
        return mine

    # ---- the thread ----

    def _attend(self) -> None:
        while not self.mine.left:
            try:
                self._beat()
                self._look_at_children()
                self._judge()
                failure = self._find_failure()
            except RuntimeError:
                failure = self.failure = self.failure or self._store_lost()
            if failure is not None and not self.mine.left:
                self._end(failure)
                return
            time.sleep(BEAT_SECONDS)

    def _end(self, failure: Failure) -> None:
        """Give the main thread some time to find out by itself; it may never."""
        if self._left.wait(GRACE_SECONDS):
            return
        if self._mine_to_say(failure):
            console.show_cursor()
            sys.stderr.write(f"qlora-lightning: {harmless(redacted(failure.line))}\n")
            sys.stderr.flush()
        with suppress(RuntimeError):
            self.mine.left = True
            self._beat()
        self._end_children()
        os._exit(failure.code)

    def _beat(self) -> None:
        with self._lock:  # none that began earlier may come later
            self.mine.count += 1
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            if frame is not None:
                self.mine.at = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}, {frame.f_code.co_name}"
            self.hand_on(f"beat/{self.rank}", asdict(self.mine))

    def _read(self, rank: int) -> Beat | None:
        key = self._key(f"beat/{rank}")
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _judge(self) -> None:
        """The first rank judges all, the others judge the first."""
        now = time.monotonic()
        for rank in range(self.ranks) if self.rank == 0 else [0]:
            self._heard.see(rank, self._read(rank), now)
        if (silent := self._heard.silent(now, SUSPECT_SECONDS if self._suspecting else SILENT_SECONDS)) is not None:
            self._declare(silent.rank, f"{silent.line}; {self.way_on}", 2)
        if self.rank == 0 and (missing := self._heard.missing(now, self.limit_seconds)) is not None:
            longer = "with a longer --ranks.patience_seconds if it is only slow"
            self._declare(missing.rank, f"{missing.line}; {self.way_on}, {longer}", 2)

    def _look_at_children(self) -> None:
        """Fail one that has ended without leaving; a rank that a signal stops leaves, and has an exit code all the same."""
        for rank, child in self._children.items():
            if child.poll() and ((beat := self._read(rank)) is None or not beat.left):
                self._declare(rank, f"{ending(child.returncode)}, {beat or NOT_BEGUN}; {self.way_on}", 2)


current: RollCall | None = None
"""This process's, where the run has several ranks."""


def begin(rank: int, ranks: int, address: tuple[str, int], hosts: bool, way_on: str, run: int = 0) -> RollCall:
    """Take part in the roll call of a run; from here on ranks but the first are quiet."""
    global current
    assert current is None
    console.quiet = rank != 0
    if rank != 0:
        warnings.simplefilter("ignore")
    current = RollCall(rank, ranks, address, hosts, way_on, run)
    return current


def current_call() -> RollCall:
    """``current``, which is there where ranks are launched."""
    assert current is not None
    return current


def end() -> int:
    """Leave it, if there is one. Gives the exit code of a failure of another rank's, else 0."""
    global current
    call, current = current, None
    console.quiet = False
    return call.leave() if call is not None else 0


def _leave_group(failed: bool) -> None:
    """End the process group, as its other ranks have ended; with ranks that are lost NCCL would wait for them."""
    import torch.distributed as dist

    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()
