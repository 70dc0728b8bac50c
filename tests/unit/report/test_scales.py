"""Ticks and numbers of the plots."""

from __future__ import annotations

import pytest

from lpl.report.scales import Scale, scale_for, short


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0"), (1.5, "1.5"), (-0.25, "−0.25"), (12, "12"), (123.4, "123"), (1000, "1000"), (9999.4, "9999"),
        (12345, "12.3k"), (2.5e6, "2.5M"), (3e9, "3G"), (0.00123, "0.00123"), (0.00006, "6e−5"), (1.234e-7, "1.23e−7"),
        (999.6, "1000"), (99.96, "100"), (9999.6, "10k"), (999_999, "1M"), (-999.96e6, "−1G"), (0.0009996, "0.001"),
        (2.5e12, "2.5T"), (3e15, "3e15"), (None, "–"), (float("nan"), "–"), (float("inf"), "–"),
    ],
)  # fmt: skip
def test_numbers_for_readers(value: float | None, told: str) -> None:
    assert short(value) == told


def test_digits() -> None:
    assert short(0.065432, 2) == "0.065"
    assert short(0.065432, 4) == "0.06543"


def test_places_on_straight_and_logarithmic_scales() -> None:
    straight, log = Scale(0, 10, 100, 200), Scale(0.01, 100, 0, 400, log=True)
    assert [straight(v) for v in (0, 5, 10)] == [100, 150, 200]
    assert [log(v) for v in (0.01, 1, 100)] == pytest.approx([0, 200, 400])


def test_ticks_are_round_and_inside() -> None:
    assert Scale(0, 10, 0, 1).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Scale(-0.31, 0.29, 0, 1).ticks(6) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1, 0.2])
    assert Scale(0.002, 300, 0, 1, True).ticks(6) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert Scale(0.02, 0.3, 0, 1, True).ticks(5) == pytest.approx([0.02, 0.05, 0.1, 0.2])


def test_scales_hold_every_value_even_a_single_one() -> None:
    for values in ([3.0], [0.0], [-1.0, 5.0], []):
        scale = scale_for(values, 0, 1)
        assert scale.low < scale.high
        assert all(scale.low <= v <= scale.high for v in values)
    assert scale_for([2.0, 5.0], 0, 1, zero=True).low == 0
    assert (scale_for([0.0], 0, 1, zero=True).low, scale_for([0.0], 0, 1, zero=True).high) == (0, 1)
    log = scale_for([0.1, 0.1], 0, 1, log=True)
    assert 0 < log.low < 0.1 < log.high
