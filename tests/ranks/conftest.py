"""Ranks that tests share: starting one costs more than most of what is tested on it."""

from collections.abc import Iterator

import pytest
from starting import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes that are ranks 0 and 1 of one group; see ``starting.py``."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
