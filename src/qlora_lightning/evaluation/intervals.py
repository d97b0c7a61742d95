"""95 % intervals of shares, and of means of shares: what MMLU's and CrowS-Pairs' numbers have beside them."""

from collections.abc import Sequence
from math import hypot, sqrt
from statistics import NormalDist
from typing import NamedTuple

_Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A number from 0 to 1 with the 95 % interval of what other questions of the same kind would give."""

    value: float
    low: float
    high: float


def share(hits: int, total: int) -> Estimate:
    """``hits`` of ``total`` with Wilson's interval (Wilson 1927), which stays in [0, 1] and holds for few and near 0 and 1 too."""
    value, weight = hits / total, 1 + _Z**2 / total
    middle = (value + _Z**2 / (2 * total)) / weight
    half = _Z / weight * sqrt(value * (1 - value) / total + _Z**2 / (4 * total**2))
    return Estimate(value, max(0.0, middle - half), min(1.0, middle + half))


def mean(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent shares, each of the same weight, with its interval.

    The distances from the shares to the ends of their intervals add up as independent errors do (the method of variance estimates
    recovery: Zou and Donner, Statistics in Medicine 27, 2008). Of one share it is that share's own interval.
    """
    value = sum(one.value for one in parts) / len(parts)
    below = hypot(*(one.value - one.low for one in parts)) / len(parts)
    above = hypot(*(one.high - one.value for one in parts)) / len(parts)
    return Estimate(value, max(0.0, value - below), min(1.0, value + above))
