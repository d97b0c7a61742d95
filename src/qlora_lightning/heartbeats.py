"""Who of the ranks is dead, and who keeps the others waiting: judged from what each shows of itself, twice a second."""

from dataclasses import dataclass
from typing import NamedTuple

SILENT_SECONDS = 40.0
"""A rank that gives no sign of life for so long is taken for dead: longer than anything here keeps Python from its threads."""
SUSPECT_SECONDS = 5.0
"""The same, once a collective has failed, which means that some rank is gone."""


@dataclass
class Beat:
    """What a rank shows of itself."""

    node: str
    count: int = 0
    step: int | None = None
    """The optimizer step that it is in; None between two steps and outside of training."""
    arrived: bool = False
    """Whether it has come to the end of that step, where ranks wait for each other."""
    at: str = ""
    """Where its main thread is."""
    left: bool = False

    def __str__(self) -> str:
        """Where in the run it was."""
        return f"last seen in step {self.step}" if self.step is not None else "last seen outside of a training step"


class Finding(NamedTuple):
    """A rank that the run must end for, and why."""

    rank: int
    line: str


class Heartbeats:
    """What has been seen of each rank, by the clock of one of them."""

    def __init__(self) -> None:
        self.last: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}
        self._waiting: tuple[int, float] | None = None

    def see(self, rank: int, beat: Beat | None, now: float) -> None:
        """Take note of what ``rank`` shows at ``now``, in seconds of any clock; None where it has not come yet."""
        if beat is not None and self.last.get(rank) != beat:
            self.last[rank], self._changed[rank] = beat, now

    def silent(self, now: float, limit: float) -> Finding | None:
        """A rank that has shown itself no longer for more than ``limit`` seconds, though it has not left."""
        for rank, beat in self.last.items():
            seconds = now - self._changed[rank]
            if not beat.left and seconds > limit:
                gone = "it was killed, or its machine is gone or stands still"
                return Finding(rank, f"no sign of life for {seconds:.0f} s, {beat}: {gone}")
        return None

    def missing(self, now: float, limit: float | None) -> Finding | None:
        """A rank for which others have waited at the end of a step for more than ``limit`` seconds.

        Only one that is in a step counts: what is done between two steps (validation, saving, samples) takes as long as it takes.
        """
        in_step = {rank: (beat.step, beat.arrived) for rank, beat in self.last.items() if beat.step is not None}
        step = max((step for step, arrived in in_step.values() if arrived), default=None)
        missing = [rank for rank, place in in_step.items() if place != (step, True)]
        if step is None or not missing:
            self._waiting = None
            return None
        if self._waiting is None or self._waiting[0] != step:
            self._waiting = (step, now)
        if limit is None or now - self._waiting[1] <= limit:
            return None
        waited = f"is not at the end of step {step}, where others have waited for {limit:.0f} s"
        return Finding(missing[0], f"{waited}: it hangs or is far slower (at {self.last[missing[0]].at})")


def ending(returncode: int) -> str:
    """What a process's exit code says."""
    if returncode == -9:
        return "it was killed (SIGKILL), most often because the kernel had no memory left"
    return f"it was ended by signal {-returncode}" if returncode < 0 else f"it ended with exit code {returncode}"
