"""What is drawn of a curve."""

import numpy as np
import pytest

from qlora_lightning.report.curves import Smoothing, is_spiky, smooth, smoothing_window, thin
from qlora_lightning.report.reading import Curve


def curve(values: list[float]) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), np.array(values))


def test_a_mean_is_of_the_values_that_there_are() -> None:
    assert smooth(curve([1, 2, 6, 4]), Smoothing(3)).values.tolist() == pytest.approx([1.5, 3, 4, 5])
    assert smooth(curve([1, 2, 6, 4]), Smoothing(9)).values.tolist() == pytest.approx([3.25] * 4)


@pytest.mark.parametrize("window", [1, 5, 37])
@pytest.mark.parametrize("n", [1, 3, 200])
def test_smoothing_keeps_steps_and_equals_its_definition(n: int, window: int) -> None:
    given = Curve(np.arange(float(n)), np.random.default_rng(0).normal(size=n))
    smoothed, reach = smooth(given, Smoothing(window)), window // 2
    assert smoothed.steps is given.steps
    expected = [given.values[max(0, at - reach) : at + reach + 1].mean() for at in range(n)]
    np.testing.assert_allclose(smoothed.values, expected, atol=1e-12)


def test_a_median_ignores_a_spike() -> None:
    assert smooth(curve([1, 1, 90, 1, 1]), Smoothing(3, "median")).values.tolist() == [1] * 5


def test_short_curves_are_not_smoothed() -> None:
    assert [smoothing_window(n) for n in (5, 29, 30, 1000, 30_000)] == [1, 1, 5, 21, 601]


def test_thinning_loses_no_spike() -> None:
    values = np.zeros(100_003)
    values[[3, 51_234, 100_002]] = 7, -9, 5
    thinned = thin(Curve(np.arange(100_003.0), values), most=100)
    assert len(thinned.steps) <= 100 and (np.diff(thinned.steps) > 0).all()
    found = dict(zip(thinned.steps.tolist(), thinned.values.tolist(), strict=True))
    assert {step: value for step, value in found.items() if value} == {3: 7, 51_234: -9, 100_002: 5}


def test_a_short_curve_is_drawn_as_it_is() -> None:
    given = curve([3, 1, 2])
    assert thin(given) is given


def test_spikes_ask_for_a_logarithmic_axis_unless_there_are_zeros() -> None:
    assert is_spiky(np.array([1.0, 1, 1, 50])) and not is_spiky(np.array([1.0, 2, 3])) and not is_spiky(np.array([0.0, 1, 1, 50]))
