"""Intervals against scipy, and against what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lpl.evaluation.intervals import (
    bootstrap_interval,
    deviation,
    noise_floor,
    quantile,
    t_interval,
    t_probability,
    t_quantile,
)

VALUES = [0.31, -0.12, 0.08, 0.44, 0.02, 0.19, -0.05, 0.27]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 12.0])
def test_t_probability_is_scipys(t: float, freedom: int) -> None:
    expected = stats.t.cdf(t, freedom) - stats.t.cdf(-t, freedom)
    assert t_probability(t, freedom) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantile_is_scipys(level: float, freedom: int) -> None:
    assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_t_quantiles_of_the_textbook() -> None:
    assert t_quantile(0.95, 2) == pytest.approx(4.3027, abs=5e-5)
    assert t_quantile(0.95, 4) == pytest.approx(2.7764, abs=5e-5)


def test_interval_is_that_of_scipys_paired_test() -> None:
    base = [1.0, 1.3, 0.9, 1.1, 1.2, 1.05, 0.95, 1.15]
    arm = [b + d for b, d in zip(base, VALUES, strict=True)]
    expected = stats.ttest_rel(arm, base).confidence_interval(0.95)
    assert t_interval(VALUES) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_one_value_has_no_interval() -> None:
    assert t_interval([0.3]) is None
    assert bootstrap_interval([0.3]) is None
    assert noise_floor([0.3]) is None


def test_equal_values_have_no_interval_unless_they_are_nothing() -> None:
    """An interval of no width would be sure of everything; rounding is no spread."""
    for interval in (t_interval, bootstrap_interval):
        assert interval([0.0, 0.0, 0.0]) == (0.0, 0.0)
        assert interval([0.5, 0.5]) is None
        assert interval([0.62 - 0.6, 0.52 - 0.5, 0.3 - 0.28]) is None
        assert interval([0.02, 0.02 + 1e-8]) is not None


def test_bootstrap_of_two_values_by_hand() -> None:
    """Means 0, 1/2, 1/2 and 1, each as often; between them by straight lines."""
    low, high = bootstrap_interval([0.0, 1.0]) or (0, 0)
    assert low == pytest.approx(0.5 * 0.025 * 3)
    assert high == pytest.approx(1 - 0.5 * 0.025 * 3)


def test_bootstrap_of_all_resamples_is_numpys() -> None:
    values = np.array(VALUES[:4])
    places = np.stack(np.meshgrid(*[range(4)] * 4), -1).reshape(-1, 4)
    expected = np.quantile(values[places].mean(1), [0.025, 0.975])
    assert bootstrap_interval(VALUES[:4]) == pytest.approx(tuple(expected), rel=1e-12)


def test_drawn_bootstrap_is_near_scipys_and_always_the_same() -> None:
    found = bootstrap_interval(VALUES)
    assert found == bootstrap_interval(VALUES)
    expected = stats.bootstrap((np.array(VALUES),), np.mean, method="percentile", n_resamples=50_000, rng=1)
    low, high = expected.confidence_interval
    assert found == pytest.approx((low, high), abs=0.01)


def test_quantile_is_numpys() -> None:
    ordered = sorted(VALUES)
    for share in (0.0, 0.025, 0.4, 0.975, 1.0):
        assert quantile(ordered, share) == pytest.approx(np.quantile(VALUES, share), rel=1e-12)


def test_noise_floor_is_that_of_a_difference_of_two() -> None:
    """Over all pairs, mean (a - b)^2 = 2 s^2."""
    assert noise_floor(VALUES) == pytest.approx(math.sqrt(2) * deviation(VALUES), rel=1e-12)
    assert noise_floor([1.0, 4.0]) == 3.0
