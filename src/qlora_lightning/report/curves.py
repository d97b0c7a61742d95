"""What is drawn of a curve: a smoothed one, and few enough points of a long one. Numbers only.

Shapes: n values of a curve.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from scipy.ndimage import median_filter

from qlora_lightning.report.reading import Curve, Values

MOST_POINTS = 2000
"""Points of a line above which it is thinned: more than a screen has columns for it."""
LEAST_SMOOTHED = 30
"""Values below which a curve is shown as it is."""


class Smoothing(NamedTuple):
    """What stands for a value: the mean or the median of the ``window`` values (an odd number) around it."""

    window: int
    by: Literal["mean", "median"] = "mean"


UNSMOOTHED = Smoothing(1)


def smooth(curve: Curve, smoothed: Smoothing) -> Curve:
    """A smoothed curve. At both ends a mean is of the values that there are; for a median the curve is mirrored."""
    window, values = smoothed.window, curve.values
    if smoothed.by == "median":
        return Curve(curve.steps, median_filter(values, window, mode="mirror"))
    sums, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    first, last = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return Curve(curve.steps, (sums[last] - sums[first]) / (last - first))


def smoothing_window(longest: int) -> int:
    """An odd number of values, about 2 % of the longest curve and at least 5; 1 for short curves, which smoothing would only blur."""
    return 1 if longest < LEAST_SMOOTHED else max(5, longest // 50 | 1)


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """The lowest and the highest value of each of ``most / 2`` equal parts, so that no spike is lost; a short curve as it is."""
    n = len(curve.values)
    if n <= most:
        return curve
    borders = np.linspace(0, n, most // 2 + 1).astype(int)
    parts = [(first, curve.values[first:last]) for first, last in pairwise(borders)]
    chosen = sorted({first + int(pick) for first, part in parts for pick in (part.argmin(), part.argmax())})
    return Curve(curve.steps[chosen], curve.values[chosen])


def is_spiky(values: Values) -> bool:
    """Whether a few values are so high that only a logarithmic axis shows the others."""
    return bool(values.min() > 0 and values.max() > 20 * np.median(values))
