"""How long requests to a server wait: for their turn at a kept rate, and before they are sent again."""

import asyncio
import random
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

FIRST_WAIT_SECONDS = 1.0
"""Longest wait before the first retry; it doubles with each."""
LONGEST_BACKOFF_SECONDS = 60.0
"""Where the doubling ends."""


class Gate:
    """Lets attempts start at even distances: no minute holds more than its share."""

    def __init__(self, per_minute: int | None) -> None:
        self._distance = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def enter(self) -> None:
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._distance
        await asyncio.sleep(start - now)

    def hold(self, seconds: float) -> None:
        """Let nobody in for a while."""
        self._next = max(self._next, time.monotonic() + seconds)


def backoff(attempt: int) -> float:
    """Seconds before the next attempt: doubling, and spread so that requests turned away together do not come back together."""
    longest: float = min(LONGEST_BACKOFF_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    return random.uniform(longest / 2, longest)


def retry_after(headers: Any) -> float:
    """Seconds that a reply asks to wait: a number or a date (RFC 9110, 10.2.3); 0 where it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    until = _moment(value)
    if until is None:
        return 0.0
    # by the server's own clock where it tells the time: this machine's may be wrong by hours
    return max(0.0, until - (_moment(headers.get("date", "")) or time.time()))


def _moment(value: str) -> float | None:
    """Seconds since 1970 of a date in a header; None where it is none."""
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()  # "-0000" says no zone
