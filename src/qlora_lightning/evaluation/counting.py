"""How far a long measurement is: a live bar on a terminal, a plain line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from qlora_lightning.console import console, is_live, say

LINE_SECONDS = 15.0
"""Time between two lines in a log file."""


@contextmanager
def counting(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show the count, the rate and the time left of a piece of work.

    Args:
        name: What is done.
        total: How many units the work has.
        unit: What is counted, as in "tokens".

    Yields:
        What is to be called with the number of units that were done since its last call.
    """
    if not is_live():
        yield _Lines(name, total, unit).advance
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, expand=True) as bars:
        task = bars.add_task(name, total=total)
        yield lambda units: bars.update(task, advance=units)


class _Lines:
    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.began = self.printed = time.monotonic()

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.printed < LINE_SECONDS or self.done >= self.total:
            return
        self.printed, rate = now, self.done / (now - self.began)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "unknown"
        say(f"{self.name}  {self.done:,} of {self.total:,} {self.unit}  {_figure(rate)} {self.unit}/s  {left} left")


def _figure(rate: float) -> str:
    return f"{rate:,.{0 if rate >= 10 else 2}f}"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = f"  {_figure(task.speed)}/s" if task.speed else ""
        return Text(f"{task.completed:,.0f} of {task.total or 0:,.0f} {self.unit}{rate}")
