"""The sentence on an arm, for what is planted: help, harm, nothing, and too little to tell."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from lpl.comparison.sentences import seeds_needed, verdict_on
from lpl.comparison.verdict import Noise, Pair, entry
from lpl.evaluation.guidance import at_best, edge_notes
from lpl.evaluation.intervals import deviation

GUIDANCE = (1.0, 3.0, 5.0)
ARM = {"name": "lpl", "overrides": {"lpl_weight": "auto"}, "repeats": False}
BASE = {"name": "base", "overrides": {"lpl_weight": "0"}, "repeats": False}
LOSS = "validation/raw/diffusion_loss"


def planted(ratios: Sequence[float], steps: int = 20, recall: Sequence[float] = (), best: float = 3.0) -> list[Any]:
    """Rows of a seed for each ratio, least at one guidance; seeds differ among each other by far more."""
    found = []
    for seed, ratio in enumerate(ratios):
        for g in GUIDANCE:
            value = (100 + 30 * seed) * (1 + 0.1 * abs(g - best))
            for arm, factor, more in (("base", 1.0, 0.0), ("lpl", ratio, recall[seed] if recall else 0.0)):
                row = {"arm": arm, "seed": seed, "guidance": g, "sampling_steps": steps, "frechet": factor * value}
                found.append(row | {"precision": 0.5, "recall": 0.4 + more, "high_band_log_error": 0.2})
    return found


def said(rows: list[Any], arm: dict[str, Any] = ARM, paired: Sequence[Any] = ()) -> dict[str, Any]:
    return verdict_on(arm, BASE, at_best(rows, "lpl", "base"), paired, "raw", 500)


def losses(*differences: float, noise: Noise | None = None) -> list[Any]:
    return [entry("lpl", LOSS, "steps", [Pair(0.5, 0.5 + 0.5 * d) for d in differences], noise)]


def test_help() -> None:
    found = said(planted((0.93, 0.94, 0.95)))
    assert (found["arm"], found["outcome"], found["by"]) == ("lpl", "helps", "samples")
    assert found["sentence"] == (
        "lpl helps at 20 sampling steps: Fréchet distance 6 % lower (95 %: 3.5 % to 8.5 % lower); each at its own "
        "best guidance (at 20 steps 3 against 3), chosen on the other seeds."
    )


def test_harm_and_help_at_other_steps() -> None:
    assert said(planted((1.05, 1.06, 1.07)))["sentence"].startswith(
        "lpl harms at 20 sampling steps: Fréchet distance 6 % higher (95 %: 3.5 % to 8.5 % higher); each"
    )
    both = said(planted((1.05, 1.06, 1.07)) + planted((0.93, 0.94, 0.95), 4))
    assert both["outcome"] == "mixed"
    assert "harms at 20 sampling steps: " in both["sentence"]
    assert "; helps at 4 sampling steps: 6 % lower" in both["sentence"]


def test_help_that_costs_variety_says_so() -> None:
    found = said(planted((0.93, 0.94, 0.95), recall=(-0.03, -0.031, -0.032)))
    assert found["outcome"] == "helps"
    assert "8.5 % lower), though recall is 0.031 lower; each" in found["sentence"]
    assert "though" not in said(planted((0.93, 0.94, 0.95), recall=(-0.03, 0.03, 0.0)))["sentence"]


def test_null() -> None:
    found = said(planted((0.99, 1.0, 1.012)))
    assert found["outcome"] == "none"
    assert found["sentence"].startswith(
        "lpl makes no measurable difference at 20 sampling steps: Fréchet distance 0.063 % higher (95 %: 2.6 % lower "
        "to 2.8 % higher), and it would take more than 1000 seeds of 500 samples to show a difference of 0.063 %; each"
    )
    assert "equal to the last digit; each" in said(planted((1.0, 1.0, 1.0)))["sentence"]


def test_too_little() -> None:
    found = said(planted((0.9, 1.0, 1.05)))
    assert found["outcome"] == "unknown"
    number = seeds_needed(deviation([math.log(r) for r in (0.9, 1.0, 1.05)]), 0.05)
    assert f"and it would take about {number} seeds of 500 samples to show a difference of 5 %" in found["sentence"]
    assert found["sentence"].startswith("lpl: too little to tell at 20 sampling steps: Fréchet distance ")
    one = said(planted((0.7,)))
    assert one["outcome"] == "unknown"
    assert "30 % lower, of one seed, which has no interval: 3 --seeds or more would tell" in one["sentence"]
    assert one["sentence"].endswith("chosen on this one seed itself.")
    same = said(planted((0.9, 0.9)))
    assert same["outcome"] == "unknown"
    assert "the same in all 2 seeds" in same["sentence"]


def test_null_arms_are_seldom_told_to_help_or_harm() -> None:
    """Of 400 comparisons without a difference, 5 % are to be told one; of a difference of 10 %, nearly all."""
    draw = random.Random(1)
    outcomes = [said(planted([math.exp(draw.gauss(0, 0.02)) for _ in range(4)]))["outcome"] for _ in range(400)]
    assert 6 <= sum(outcome in ("helps", "harms") for outcome in outcomes) <= 38
    real = [said(planted([0.9 * math.exp(draw.gauss(0, 0.02)) for _ in range(4)]))["outcome"] for _ in range(50)]
    assert real.count("helps") > 45


def test_seeds_that_would_tell() -> None:
    """Simulated: with so many seeds the interval leaves 0 out in four of five cases, with fewer in less."""
    number = seeds_needed(0.05, 0.05)
    assert number == 10
    assert seeds_needed(0.02, 0.05) < number < seeds_needed(0.05, 0.02)
    assert seeds_needed(0.05, 0.0) is None
    assert seeds_needed(1.0, 0.001) is None
    from lpl.evaluation.intervals import t_interval

    draw = random.Random(0)

    def power(n: int) -> float:
        found = [t_interval([draw.gauss(0.05, 0.05) for _ in range(n)]) for _ in range(600)]
        return sum(ends is not None and ends[0] > 0 for ends in found) / 600

    assert 0.75 < power(number) < 0.88
    assert power(number // 2) < 0.65


@pytest.mark.parametrize("differences", [(-0.02, -0.021, -0.022), (0.02, 0.021, 0.022), (0.0, 0.0001, 0.0002), (-0.2,)])
def test_validation_loss_is_no_help_of_lpl(differences: tuple[float, ...]) -> None:
    found = said([], paired=losses(*differences))
    assert (found["outcome"], found["by"]) == ("unknown", "validation")
    assert found["sentence"].startswith("lpl: too little to tell: no samples were measured, and validation's diffusion")
    assert "by itself neither help nor harm of LPL's; --reference_dir measures samples" in found["sentence"]


def test_validation_loss_of_other_options() -> None:
    arm, base = ARM | {"overrides": {"learning_rate": "1e-4"}}, BASE | {"overrides": {}}

    def of(*differences: float, noise: Noise | None = None, **more: Any) -> dict[str, Any]:
        return verdict_on(arm | more, base, [], losses(*differences, noise=noise), "raw", 500)

    found = of(-0.02, -0.021, -0.022)
    assert found["outcome"] == "helps"
    assert found["sentence"].startswith(
        "lpl helps: validation's diffusion loss 2.1 % lower (95 %: 1.9 % to 2.3 % lower"
    )
    assert of(0.02, 0.021, 0.022)["outcome"] == "harms"
    assert of(0.001, -0.001, 0.0)["outcome"] == "none"
    assert of(0.03, -0.03, 0.0)["outcome"] == "unknown"
    repeat = Noise(0.05, "repeat")
    assert of(-0.02, -0.021, -0.022, noise=repeat)["sentence"].endswith("less than a repeat of the baseline changes.")
    assert of(-0.02, -0.021, -0.022, noise=repeat)["outcome"] == "none"
    assert of(-0.02, -0.021, -0.022, repeats=True)["sentence"].startswith("lpl has the baseline's options: ")
    assert verdict_on(arm, base, [], [], "raw", 500)["by"] is None


def test_edges_of_the_list_are_named() -> None:
    rows = planted((0.9, 0.91), best=5.0)
    assert edge_notes(rows, ["base", "lpl"]) == [
        f"{arm}, 20 steps: best guidance 5 is the end of the list: add a higher one" for arm in ("base", "lpl")
    ]
    assert edge_notes(planted((0.9, 0.91)), ["lpl"]) == []
