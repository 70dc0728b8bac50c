"""From curves of paired runs to differences at equal steps and equal time, and to words."""

from __future__ import annotations

from typing import Any

import pytest

from lpl.comparison.measures import Measured, at, by_seconds
from lpl.comparison.verdict import Pair, compare_arm, entry, noise_of

LOSS = "validation/ema/diffusion_loss"


def run(seed: int, ends: float, seconds_per_step: float = 1.0, start: float = 1.0, **metrics: float) -> Measured:
    """A run of 10 steps whose loss goes straight from start to ends."""
    curve = [(0.0, start), (10.0, ends)]
    clock = [(0.0, 0.0), (10.0, 10 * seconds_per_step)]
    return Measured(seed, f"a/seed-{seed}", 10, clock[-1][1], {LOSS: ends} | metrics, {LOSS: curve}, clock, [])


def by_key(entries: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["metric"], e["abscissa"]): e for e in entries}


def test_values_between_are_on_a_straight_line() -> None:
    curve = [(0.0, 1.0), (10.0, 3.0), (20.0, 2.0)]
    assert [at(curve, x) for x in (0, 5, 10, 15, 20)] == [1.0, 2.0, 3.0, 2.5, 2.0]
    assert at(curve, 21) is None
    assert at([(4.0, 7.0)], 4) == 7.0
    assert at([(4.0, 7.0)], 3) is None


def test_curve_over_seconds() -> None:
    assert by_seconds([(0.0, 5.0), (5.0, 4.0), (99.0, 3.0)], [(0.0, 0.0), (10.0, 30.0)]) == [(0.0, 5.0), (15.0, 4.0)]


def test_equal_steps_and_equal_time() -> None:
    """The arm is better at equal steps, but takes twice the time and so is worse at equal time."""
    base = [run(s, 0.8 + 0.01 * s) for s in range(3)]
    arm = [run(s, 0.7 + 0.01 * s, seconds_per_step=2.0) for s in range(3)]
    entries, refused = compare_arm("lpl", arm, base)
    found = by_key(entries)
    assert refused == []
    steps, seconds = found[LOSS, "steps"], found[LOSS, "seconds"]
    assert steps["difference"] == pytest.approx(-0.1)
    assert steps["outcome"] == "better"
    # After 10 s the baseline is at its end, the arm halfway from 1 to its end.
    expected = [(1 + 0.7 + 0.01 * s) / 2 - (0.8 + 0.01 * s) for s in range(3)]
    assert seconds["differences"] == pytest.approx(expected)
    assert seconds["outcome"] == "worse"
    assert seconds["verdict"].startswith("worse by 5.6 %")


def test_runs_of_different_length_are_compared_where_the_shorter_ends() -> None:
    base = [run(s, 0.8) for s in range(2)]
    longer = [Measured(s, "b", 20, 20.0, {LOSS: 0.4}, {LOSS: [(0.0, 1.0), (20.0, 0.4)]}, [(0.0, 0.0), (20.0, 20.0)], [])
              for s in range(2)]  # fmt: skip
    found = by_key(compare_arm("longer", longer, base)[0])
    assert found[LOSS, "steps"]["value"] == pytest.approx(0.7)


def test_figures_measured_at_the_end_are_not_compared_at_equal_time() -> None:
    base = [run(s, 0.8, frechet=10.0 + s, precision=0.5) for s in range(3)]
    arm = [run(s, 0.8, frechet=8.0 + s, precision=0.6 + 0.001 * s) for s in range(3)]
    entries, refused = compare_arm("lpl", arm, base)
    found = by_key(entries)
    assert ("frechet", "seconds") not in found
    assert refused == ["lpl: frechet, precision: not compared at equal training time: measured at the end only"]
    assert found["frechet", "steps"]["outcome"] == "better"
    assert found["precision", "steps"]["outcome"] == "better"
    assert found["precision", "steps"]["lower_is_better"] is False


def test_what_one_side_lacks_is_named() -> None:
    base, arm = [run(s, 0.8) for s in range(2)], [run(s, 0.8, recall=0.5) for s in range(2)]
    assert compare_arm("lpl", arm, base)[1] == ["lpl: recall: not measured in the baseline"]


def test_only_seeds_of_both_are_paired() -> None:
    entries, _ = compare_arm("lpl", [run(1, 0.7), run(2, 0.7)], [run(0, 0.8), run(1, 0.8), run(2, 0.9)])
    assert by_key(entries)[LOSS, "steps"]["differences"] == pytest.approx([-0.1, -0.2])
    assert compare_arm("lpl", [run(7, 0.7)], [run(0, 0.8)]) == (
        [],
        ["lpl: no seed is finished in it and in the baseline"],
    )


def words(*pairs: tuple[float, float], noise: float | None = None, repeats: bool = False) -> str:
    return str(entry("a", LOSS, "steps", [Pair(*pair) for pair in pairs], noise, repeats)["verdict"])


def test_an_interval_across_zero_is_no_measurable_difference() -> None:
    said = words((1.0, 1.01), (1.0, 0.99), (1.0, 1.0))
    # mean 0, s 0.01, t(0.975, 2) 4.303: 4.303 * 0.01 / sqrt(3) = 0.0248
    assert said == "no measurable difference (+0 %; beyond 2.5 % ruled out)"


def test_equal_runs_are_told_as_such() -> None:
    assert words((1.0, 1.0), (1.1, 1.1)) == "no measurable difference: equal to the last digit"


def test_a_difference_has_its_size() -> None:
    assert words((1.0, 0.9), (1.0, 0.9), (1.0, 0.9001)) == "better by 10 %"
    assert words((1.0, 1.1), (1.0, 1.1), (1.0, 1.1001), noise=0.01) == "worse by 10 %"
    assert words((1.0, 0.9), (1.0, 0.9), noise=0.3) == "better by 10 %; less than another seed changes"


def test_large_and_small_sizes_are_plain_numbers() -> None:
    assert words((1.0, 3.5), (1.0, 3.5)) == "worse by 250 %"
    assert words((1.0, 1.0000123), (1.0, 1.0000123)) == "worse by 0.0012 %"
    assert words((0.0, 0.5), (0.0, 0.5)) == "worse by 0.5"


def test_a_repeat_that_differs_shows_rounding() -> None:
    assert words((1.0, 0.9), (1.0, 0.9), repeats=True).endswith("rounding alone does that here")


def test_one_seed_gives_no_verdict() -> None:
    found = entry("a", LOSS, "steps", [Pair(1.0, 0.5)], None)
    assert found["outcome"] == "unknown"
    assert found["interval"] is found["bootstrap"] is None
    assert found["verdict"] == "one seed: no interval, so no verdict"


def test_noise_is_without_the_draws_of_validation() -> None:
    """Seeds draw other noise for validation, which shifts start and end alike."""
    runs = [run(0, 0.8, start=1.0), run(1, 1.3, start=1.5), run(2, 0.5, start=0.6)]
    # Changes: -0.2, -0.2, -0.1; pairs 0, 0.1, 0.1.
    assert noise_of(LOSS, runs) == pytest.approx((0.02 / 3) ** 0.5)
    ends = [run(0, 0.8, frechet=3.0), run(1, 0.8, frechet=5.0)]
    assert noise_of("frechet", ends) == 2.0
