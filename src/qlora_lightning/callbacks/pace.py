"""How fast work goes, and how long it will take."""

from dataclasses import dataclass


def clock(seconds: float | None) -> str:
    """``seconds`` as h:mm:ss; dashes when unknown."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@dataclass
class Pace:
    """Time of this session, whatever an earlier one took before a resume.

    The speed leaves out the session's first step, which also compiles kernels and fills caches.
    """

    total: int | None
    """Steps of the whole run; None when it has no end."""
    step: int
    """Steps done so far, those of earlier sessions included."""
    started: float
    """Moment of the session's start, in seconds."""
    first_step: int = 0
    first_moment: float | None = None
    last_moment: float = 0.0

    def advance(self, step: int, now: float) -> None:
        """Note that ``step`` steps are done at the moment ``now``."""
        if self.first_moment is None:
            self.first_step, self.first_moment = step, now
        self.step, self.last_moment = step, now

    def elapsed(self, now: float) -> float:
        """Seconds of this session."""
        return now - self.started

    def left(self, now: float) -> float | None:
        """Seconds left at this session's speed; None while it is unknown."""
        if self.total is None or self.first_moment is None or self.step == self.first_step:
            return None
        seconds_per_step = (self.last_moment - self.first_moment) / (self.step - self.first_step)
        return max(0.0, (self.total - self.step) * seconds_per_step - (now - self.last_moment))

    def times(self, now: float) -> str:
        """Time of the session and time left."""
        return f"{clock(self.elapsed(now))} < {clock(self.left(now))}"

    def __str__(self) -> str:
        return f"{self.step}/{'?' if self.total is None else self.total}"
