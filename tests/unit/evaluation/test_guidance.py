"""Rows at points of guidance and steps: own best guidance chosen on other seeds, ratios with intervals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lpl.evaluation.guidance import at_best, chosen_guidance, curve_of, edges, rows_of
from lpl.evaluation.intervals import paired_ratio

Values = dict[int, dict[float, float]]


def rows(arm: str, curves: Values, steps: int = 20, recall: float = 0.5) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "guidance": g, "sampling_steps": steps, "frechet": value, "precision": 0.6,
         "recall": recall + 0.001 * seed, "high_band_log_error": 0.1}
        for seed, of in curves.items() for g, value in of.items()
    ]  # fmt: skip


def test_no_seed_chooses_for_itself() -> None:
    """Seed 3 alone likes guidance 1: it is taken where the other two are best; they choose with it."""
    own = rows("lpl", {1: {1: 5, 2: 3, 3: 4}, 2: {1: 5, 2: 3, 3: 4}, 3: {1: 1, 2: 9, 3: 4}})
    curve = curve_of(own, "lpl", 20)
    assert chosen_guidance(curve) == {1: 1, 2: 1, 3: 2}
    assert edges(curve) == {}  # 1 is no guidance: nothing lies below
    missing = [row for row in own if (row["seed"], row["guidance"]) != (2, 2)]
    assert set(chosen_guidance(curve_of(missing, "lpl", 20)).values()) <= {1, 3}
    assert edges(curve_of(rows("lpl", {s: {2: 3, 3: 2} for s in (1, 2)}), "lpl", 20)) == {3: "end"}
    assert edges(curve_of(rows("lpl", {s: {2: 1, 3: 2} for s in (1, 2)}), "lpl", 20)) == {2: "beginning"}


def test_paired_ratio_against_hand() -> None:
    ratio = paired_ratio([0.9, 0.8], [1.0, 1.0])
    logs = math.log(0.9), math.log(0.8)
    half = 12.706205 * abs(logs[0] - logs[1]) / 2  # Student's t with one degree of freedom; s / sqrt(2) = |d| / 2
    assert ratio.value == pytest.approx(math.sqrt(0.72))
    assert ratio.low == pytest.approx(math.exp(sum(logs) / 2 - half), rel=1e-6)
    assert ratio.high == pytest.approx(math.exp(sum(logs) / 2 + half), rel=1e-6)


def test_each_arm_is_compared_at_its_own_best_guidance() -> None:
    """The arm is best at 2, the baseline at 3; at either scale alone the ratio would be another."""
    base = rows("base", {s: {1: 9, 2: 8, 3: 5 + s, 5: 9} for s in (0, 1, 2)})
    arm = rows("lpl", {s: {1: 7, 2: 0.8 * (5 + s), 3: 6 + s, 5: 9} for s in (0, 1, 2)}, recall=0.45)
    few = rows("base", {0: {2: 10.0}}, 4) + rows("lpl", {0: {2: 9.0}}, 4)
    many, four = at_best([*base, *arm, *few], "lpl", "base")
    assert (many["sampling_steps"], many["seeds"], many["chosen_on"]) == (20, [0, 1, 2], "other seeds")
    assert many["guidance"] == [2, 2, 2]
    assert many["baseline_guidance"] == [3, 3, 3]
    assert many["frechet"]["ratio"] == pytest.approx(0.8)
    assert many["frechet"]["ratios"] == pytest.approx([0.8, 0.8, 0.8])
    assert many["recall"]["difference"] == pytest.approx(-0.05)
    assert many["precision"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert (four["chosen_on"], four["frechet"]["interval"], four["scales"]) == ("itself", None, [2])
    assert four["frechet"]["ratio"] == pytest.approx(0.9)


def test_rows_of_an_evaluation_of_one_and_of_several_points() -> None:
    metrics = {"frechet_efficientnet-lite0": {"value": 5.0}, "recall": {"value": 0.5}, "precision": {"value": None}}
    one = {"guidance_scale": 5.0, "options": {"num_inference_steps": 25}, "metrics": metrics}
    [row] = rows_of(one)
    assert row == {
        "guidance": 5.0, "sampling_steps": 25, "frechet": 5.0, "precision": None, "recall": 0.5,
        "low_band_log_error": None, "middle_band_log_error": None, "high_band_log_error": None,
    }  # fmt: skip
    points = [{"guidance_scale": g, "num_inference_steps": 4, "metrics": metrics} for g in (1.0, 2.0)]
    found = rows_of(one | {"points": points})
    assert [(row["guidance"], row["sampling_steps"], row["frechet"]) for row in found] == [(1.0, 4, 5.0), (2.0, 4, 5.0)]
