"""Limits for a program that somebody else wrote: the time that it may take and the memory that it may add."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_UNLIMITED = resource.RLIM_INFINITY


@contextmanager
def bounded(seconds: float, num_bytes: int) -> Iterator[None]:
    """End what runs inside when it takes longer, or wants more memory, than it may.

    The time is kept on the main thread, between two steps of Python's: a single long call into C is not cut short. Memory is kept on
    Linux, for the whole process while this lasts: nothing else should be at work in it.

    Raises:
        TimeoutError: it took longer than ``seconds``.
        MemoryError: it wanted ``num_bytes`` more than the process had.
    """
    with _limited_memory(num_bytes), _limited_time(seconds):
        yield


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limited_memory(num_bytes: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    allowed = min(limit for limit in (used + num_bytes, soft, hard) if limit != _UNLIMITED)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
