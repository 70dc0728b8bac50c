"""From curves of paired runs to differences at equal steps and equal time, and to words."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lpl.comparison.measures import RunMetrics
from lpl.comparison.verdict import Noise, Pair, compare_arm, entry, noise_of, over_seconds, repeated_noise, result_table
from lpl.report.findings import chance_line
from lpl.report.runs import interpolate

LOSS = "validation/ema/diffusion_loss"


def run(
    seed: int, ends: float, seconds_per_step: float = 1.0, start: float = 1.0, every: int = 1, **metrics: float
) -> RunMetrics:
    """A run of 10 steps whose loss goes straight from start to ends, validated so often."""
    curve = [(float(step), start + step / 10 * (ends - start)) for step in range(0, 11, every)]
    clock = [(0.0, 0.0), (10.0, 10 * seconds_per_step)]
    return RunMetrics(seed, f"a/seed-{seed}", 10, clock[-1][1], {LOSS: ends} | metrics, {LOSS: curve}, clock, [])


def by_key(entries: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["metric"], e["abscissa"]): e for e in entries}


def test_values_between_are_on_a_straight_line() -> None:
    curve = [(0.0, 1.0), (10.0, 3.0), (20.0, 2.0)]
    assert [interpolate(curve, x) for x in (0, 5, 10, 15, 20)] == [1.0, 2.0, 3.0, 2.5, 2.0]
    assert interpolate(curve, 21) is None
    assert interpolate([(4.0, 7.0)], 4) == 7.0
    assert interpolate([(4.0, 7.0)], 3) is None


def test_curve_over_seconds() -> None:
    assert over_seconds([(0.0, 5.0), (5.0, 4.0), (99.0, 3.0)], [(0.0, 0.0), (10.0, 30.0)]) == [(0.0, 5.0), (15.0, 4.0)]


def test_equal_steps_and_equal_time() -> None:
    """The arm is better at equal steps, but takes twice the time and so is worse at equal time."""
    base = [run(s, 0.8 + 0.01 * s) for s in range(3)]
    arm = [run(s, 0.7 + 0.0101 * s, seconds_per_step=2.0) for s in range(3)]
    entries, refused = compare_arm("lpl", arm, base)
    found = by_key(entries)
    assert refused == []
    steps, seconds = found[LOSS, "steps"], found[LOSS, "seconds"]
    assert steps["difference"] == pytest.approx(-0.0999)
    assert steps["outcome"] == "better"
    # After 10 s the baseline is at its end, the arm halfway from 1 to its end.
    expected = [(1 + 0.7 + 0.0101 * s) / 2 - (0.8 + 0.01 * s) for s in range(3)]
    assert seconds["differences"] == pytest.approx(expected)
    assert seconds["outcome"] == "worse"
    assert seconds["verdict"].startswith("worse by 5.6 %")


def test_runs_of_different_length_are_compared_where_the_shorter_ends() -> None:
    base = [run(s, 0.8) for s in range(2)]
    points = [0, 4, 9, 11, 16, 20]
    curve, clock = [(float(s), 1 - 0.03 * s) for s in points], [(0.0, 0.0), (20.0, 20.0)]
    longer = [RunMetrics(s, "b", 20, 20.0, {LOSS: 0.4}, {LOSS: curve}, clock, []) for s in range(2)]
    found = by_key(compare_arm("longer", longer, base)[0])
    assert found[LOSS, "steps"]["value"] == pytest.approx(0.7)
    del curve[2]  # now 4 and 11 are the neighbours of 10
    entries, refused = compare_arm("longer", longer, base)
    assert entries == []
    assert refused[0].startswith(f"longer: {LOSS}: not compared at equal steps: validated too rarely")


def test_rare_validations_give_no_value_at_equal_time() -> None:
    """The slower run was validated after 0, 10 and 20 s; what it had reached after 10 s is known, after 11 s not.

    How far apart validations are counts in steps: seconds vary a little from step to step.
    """
    arm = [run(s, 0.7, seconds_per_step=2.0, every=5) for s in range(2)]
    entries, refused = compare_arm("lpl", arm, [run(s, 0.8, every=5) for s in range(2)])
    assert by_key(entries)[LOSS, "seconds"]["value"] == pytest.approx(0.85)
    assert refused == []
    entries, refused = compare_arm("lpl", arm, [run(s, 0.8, seconds_per_step=1.1, every=5) for s in range(2)])
    assert [e["abscissa"] for e in entries] == ["steps"]
    assert refused == [
        f"lpl: {LOSS}: not compared at equal training time: validated too rarely (more than 10 % of the run apart; "
        "lower --validation_steps)"
    ]
    uneven = [(0.0, 0.0), (5.0, 9.0), (6.0, 12.0), (10.0, 20.0)]
    arm = [replace(run(s, 0.7), clock=uneven) for s in range(2)]
    entries, refused = compare_arm("lpl", arm, [run(s, 0.8, seconds_per_step=1.05) for s in range(2)])
    assert refused == []
    assert by_key(entries)[LOSS, "seconds"]["value"] == pytest.approx(1 - 0.3 * 0.55)


def test_metrics_of_another_definition_are_not_compared() -> None:
    lpl = "validation/raw/lpl"
    base, arm = ([run(s, ends, **{lpl: 0.5}) for s in range(2)] for ends in (0.8, 0.7))
    entries, refused = compare_arm("deep", arm, base, redefined={"lpl": ("lpl_norm_type", "lpl_num_blocks")})
    assert {e["metric"] for e in entries} == {LOSS}
    assert refused == [
        f"deep: {lpl}: another yardstick than the baseline's: --lpl_norm_type, --lpl_num_blocks",
    ]


def test_metrics_that_are_not_finite_are_not_compared() -> None:
    base = [run(s, 0.8, fid=1.0, kid=math.inf) for s in range(2)]
    arm = [run(s, [0.7, math.nan][s], fid=[math.nan, 2.0][s], kid=1.0) for s in range(2)]
    entries, refused = compare_arm("wild", arm, base)
    assert entries == []
    assert refused[0] == f"wild: {LOSS}, fid: not compared at equal steps: not finite in wild"
    assert "wild: kid: not compared at equal steps: not finite in the baseline" in refused
    assert noise_of("kid", base) is None


def test_a_repeat_of_the_baseline_gives_the_noise() -> None:
    base = [run(s, 0.8, fid=10.0 + 5 * s) for s in range(2)]
    repeats = [run(0, 0.81, fid=13.0), run(1, 0.79, fid=11.0)]
    found = repeated_noise({"again": (repeats, {})}, base)
    assert found["fid", "steps"] == Noise(pytest.approx((((3**2) + (4**2)) / 2) ** 0.5), "repeat")
    assert found[LOSS, "seconds"].value == pytest.approx(0.01)
    arm = [run(s, 0.8, fid=9.0 + 5.001 * s, kid=1.0) for s in range(2)]
    entry_of = {with_it: by_key(compare_arm("lpl", arm, base, repeated=noise)[0])["fid", "steps"]
                for with_it, noise in ((True, found), (False, None))}  # fmt: skip
    assert (entry_of[True]["noise"], entry_of[True]["noise_from"]) == (pytest.approx(12.5**0.5), "repeat")
    assert (entry_of[False]["noise"], entry_of[False]["noise_from"]) == (5.0, "seeds")
    assert entry_of[True]["verdict"].endswith("less than a repeat of the baseline changes")
    assert entry_of[False]["verdict"].endswith("less than another seed changes")


def test_metrics_measured_at_the_end_are_not_compared_at_equal_time() -> None:
    base = [run(s, 0.8, frechet=10.0 + s, precision=0.5) for s in range(3)]
    arm = [run(s, 0.8, frechet=8.0 + 1.01 * s, precision=0.6 + 0.001 * s) for s in range(3)]
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
    between = None if noise is None else Noise(noise, "seeds")
    return str(entry("a", LOSS, "steps", [Pair(*pair) for pair in pairs], between, repeats)["verdict"])


def test_an_interval_across_zero_is_no_measurable_difference() -> None:
    said = words((1.0, 1.01), (1.0, 0.99), (1.0, 1.0))
    # mean 0, s 0.01, t(0.975, 2) 4.303: 4.303 * 0.01 / sqrt(3) = 0.0248
    assert said == "no measurable difference (+0 %; beyond 2.5 % ruled out)"


def test_equal_runs_are_told_as_such() -> None:
    assert words((1.0, 1.0), (1.1, 1.1)) == "no measurable difference: equal to the last digit"


def test_a_difference_has_its_size() -> None:
    assert words((1.0, 0.9), (1.0, 0.9), (1.0, 0.9001)) == "better by 10 %"
    assert words((1.0, 1.1), (1.0, 1.1), (1.0, 1.1001), noise=0.01) == "worse by 10 %"
    assert words((1.0, 0.9), (1.0, 0.90001), noise=0.3) == "better by 10 %; less than another seed changes"


def test_large_and_small_sizes_are_plain_numbers() -> None:
    assert words((1.0, 3.5), (1.0, 3.5001)) == "worse by 250 %"
    assert words((1.0, 1.0000123), (1.0, 1.00001231)) == "worse by 0.0012 %"
    assert words((0.0, 0.5), (0.0, 0.50001)) == "worse by 0.5"


def test_a_repeat_that_differs_shows_rounding() -> None:
    assert words((1.0, 0.9), (1.0, 0.90001), repeats=True).endswith("rounding alone does that here")


def test_one_seed_gives_no_verdict() -> None:
    found = entry("a", LOSS, "steps", [Pair(1.0, 0.5)], None)
    assert found["outcome"] == "unknown"
    assert found["interval"] is found["bootstrap"] is None
    assert found["verdict"] == "one seed: no interval, so no verdict"


def test_the_same_difference_in_every_seed_gives_no_verdict() -> None:
    """Of a share of 500 samples, two seeds easily have the same; that does not make it certain."""
    found = entry("a", "precision", "steps", [Pair(0.5, 0.501), Pair(0.6, 0.601)], None)
    assert (found["outcome"], found["interval"], found["bootstrap"]) == ("unknown", None, None)
    assert found["verdict"] == "the same difference in all 2 seeds (+0.18 %): no interval, so no verdict"


def test_a_seed_that_one_side_was_not_measured_with_costs_that_seed_alone() -> None:
    base = [run(s, 0.8, **({} if s == 1 else {"frechet": 10.0 + s})) for s in range(4)]
    arm = [run(s, 0.8, **({} if s == 3 else {"frechet": 8.0 + 1.5 * s})) for s in range(4)]
    entries, refused = compare_arm("lpl", arm, base)
    found = by_key(entries)["frechet", "steps"]
    assert (found["seeds"], found["differences"]) == (2, [-2.0, -1.0])
    assert "lpl: frechet: not measured in the baseline and lpl, seed 1, 3" in refused
    assert by_key(entries)[LOSS, "steps"]["seeds"] == 4


def test_noise_is_without_the_draws_of_validation() -> None:
    """Seeds draw other noise for validation, which shifts start and end alike."""
    runs = [run(0, 0.8, start=1.0), run(1, 1.3, start=1.5), run(2, 0.5, start=0.6)]
    # Changes: -0.2, -0.2, -0.1; pairs 0, 0.1, 0.1.
    assert noise_of(LOSS, runs) == Noise(pytest.approx((0.02 / 3) ** 0.5), "seeds")
    ends = [run(0, 0.8, frechet=3.0), run(1, 0.8, frechet=5.0)]
    assert noise_of("frechet", ends) == Noise(2.0, "seeds")


@pytest.mark.parametrize(
    ("compared", "told"),
    [
        (0, ""),
        (1, "of 1 verdict, about 0.05 would find a difference by chance alone"),
        (11, "of 11 verdicts, about 0.55 would find a difference by chance alone"),
        (39, "of 39 verdicts, about 1.95 would find a difference by chance alone"),
    ],
)
def test_chance_is_told_at_any_number(compared: int, told: str) -> None:
    known = [entry("lpl", f"m{i}", "steps", [Pair(1.0, 0.9), Pair(1.0, 0.8)], None) for i in range(compared)]
    paired = [*known, entry("lpl", "unknown", "steps", [Pair(1.0, 0.9)], None)]
    assert chance_line(paired) == told
    arms = [{"name": "lpl", "overrides": {}, "baseline": False, "runs": [], "unpaired": None}]
    table = result_table({"arms": arms, "paired": paired, "at_best": [], "notes": [], "refused": []})
    assert ("by chance alone" in table) == bool(told)
    assert table.endswith(told)
