"""Means of paired differences and their intervals: Student's t, and the bootstrap.

    mean +- t_{0.975, n-1} s / sqrt(n),  s^2 = sum (d_i - mean)^2 / (n - 1)

for differences d_i of n seeds; it assumes that they are normally distributed. The percentile bootstrap (Efron 1979)
does not, but is too narrow for few seeds, so verdicts go by Student's t.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

LEVEL = 0.95
MOST_RESAMPLES = 50_000
"""If all n^n resamples are no more than this, they are taken; else RESAMPLES are drawn."""
RESAMPLES = 10_000
SAME = 1e-9
"""Values whose relative difference is smaller are equal up to rounding."""


def deviation(values: Sequence[float]) -> float:
    """The standard deviation with n - 1."""
    middle = fmean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def t_probability(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t, by the finite sums for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    Args:
        t: at least 0.
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| <= t) = level, by bisection.

    Args:
        level: in 0..1, both excluded.
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < level:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if t_probability(middle, freedom) < level else (low, middle)


def has_spread(values: Sequence[float]) -> bool:
    """Whether values have a spread from which an interval follows: two or more that are not all equal, or all 0.

    Equal differences of two seeds, such as of shares of few samples, would give an interval of width 0, a false
    certainty. Values that are all 0 come from equal runs, which need no spread. Rounding is no spread.
    """
    if len(values) < 2:
        return False
    return not any(values) or not all(math.isclose(value, values[0], rel_tol=SAME) for value in values)


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the mean; None where has_spread says no."""
    if not has_spread(values):
        return None
    half = t_quantile(level, len(values) - 1) * deviation(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile bootstrap's interval of the mean; None where has_spread says no.

    All resamples are taken if they are few; else some are drawn, always the same ones.
    """
    number = len(values)
    if not has_spread(values):
        return None
    if number**number <= MOST_RESAMPLES:
        means = sorted(fmean(resample) for resample in itertools.product(values, repeat=number))
    else:
        draw = random.Random(0)
        means = sorted(fmean(draw.choices(values, k=number)) for _ in range(RESAMPLES))
    return quantile(means, (1 - level) / 2), quantile(means, (1 + level) / 2)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values, between neighbours by a straight line (numpy's default)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def noise_floor(values: Sequence[float]) -> float | None:
    """How much two baseline runs differ that differ in the seed only: the root mean square over all pairs.

    None for fewer than two values.
    """
    return root_mean_square([a - b for a, b in itertools.combinations(values, 2)])


def root_mean_square(values: Sequence[float]) -> float | None:
    """sqrt(mean v^2); None for no values."""
    return math.sqrt(fmean([v * v for v in values])) if values else None


class Interval(NamedTuple):
    """A mean with its interval; the ends are None where there is none."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        ends = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{ends}"

    @property
    def ends(self) -> list[float] | None:
        """The interval; None: there is none."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def mean_interval(values: Sequence[float]) -> Interval:
    """mean ± t s / sqrt(n), see t_interval."""
    low, high = t_interval(values) or (None, None)
    return Interval(fmean(values), low, high, len(values))


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Geometric mean of values / others and exp(mean ± t s / sqrt(n)) of their logarithms."""
    logs = mean_interval([math.log(a / b) for a, b in zip(values, others, strict=True)])
    low, high = [None if end is None else math.exp(end) for end in (logs.low, logs.high)]
    return Interval(math.exp(logs.value), low, high, logs.seeds)
