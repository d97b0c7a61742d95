"""The processes that other tests of ranks run in: one that dies takes no other test with it."""

import os
import signal
import time

import pytest
from starting import Ranks


def die(rank: str) -> str:
    """In a rank: end one of them as a lost rank ends itself, while another one works."""
    if os.environ["RANK"] == rank:
        os._exit(2)
    time.sleep(1)
    return rank


def test_work_goes_on_after_a_rank_has_died(two_ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank 1: .*BrokenProcessPool"):
        two_ranks.run(die, "1")
    first, second = two_ranks.run(os.getpid)
    os.kill(second, signal.SIGKILL)  # between two works
    time.sleep(0.5)
    assert first not in two_ranks.run(os.getpid)
