"""The verdict's cards say what the comparison says, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.comparison.verdict import Noise, Pair, entry
from lpl.report.findings import headline, tone, verdicts
from lpl.report.page import as_html, gather
from lpl.report.sources import Group, Inputs, Result

BETTER, WORSE = [Pair(1.0, 0.9), Pair(1.0, 0.9001)], [Pair(1.0, 1.1), Pair(1.0, 1.1001)]
NONE, SINGLE = [Pair(1.0, 1.1), Pair(1.0, 0.9)], [Pair(1.0, 0.9)]
NOISE = Noise(0.3, "seeds")
LOSS = "validation/raw/diffusion_loss"


def entries(*pairs: list[Pair], noise: Noise | None = None, at: str = "steps", name: str = "lpl") -> list[Any]:
    return [entry(name, LOSS if i == 0 else f"m{i}", at, p, noise, name == "repeat") for i, p in enumerate(pairs)]


def card(paired: list[Any], **arm: Any) -> dict[str, Any]:
    name = paired[0]["arm"]
    arms = [{"name": "baseline", "baseline": True}, {"name": name, "overrides": {"lpl_weight": 1}} | arm]
    [found] = verdicts({"arms": arms}, paired, {name: Group(f"cmp2/{name}", "3")})
    return found


@pytest.mark.parametrize(
    ("pairs", "noise", "told", "colour"),
    [
        ([NONE, NONE], None, "no measurable difference", ""),
        ([SINGLE], None, "one seed, so no interval and no verdict", ""),
        ([BETTER], None, "better in 1 of 1 figure", "good"),
        ([BETTER, NONE, BETTER], None, "better in 2 of 3 figures, no measurable difference in 1", "good"),
        ([BETTER, WORSE], None, "better in 1 of 2 figures, worse in 1 of 2 figures", "mixed"),
        (
            [BETTER, NONE],
            NOISE,
            "1 of 2 figures differs by less than what another seed alone changes, no measurable difference in 1",
            "",
        ),
        (
            [BETTER, NONE, SINGLE],
            None,
            "better in 1 of 3 figures, no measurable difference in 1, no verdict in 1",
            "good",
        ),
    ],
)
def test_outcomes_are_counted(pairs: list[list[Pair]], noise: Noise | None, told: str, colour: str) -> None:
    assert headline(entries(*pairs, noise=noise)) == told
    assert tone(entries(*pairs, noise=noise)) == colour


def test_an_arm_that_is_worse_in_equal_time_is_not_good() -> None:
    found = card([*entries(BETTER), *entries(WORSE, at="seconds")])
    assert found["tone"] == "mixed"
    assert found["headlines"] == [
        "Validation at equal steps: better in 1 of 1 figure",
        "Validation at equal training time: worse in 1 of 1 figure",
    ]
    assert found["details"] == [
        "Better at equal steps: Diffusion loss (raw) −10 %",
        "Worse at equal training time: Diffusion loss (raw) +10 %",
    ]
    assert (found["arm"], found["slot"], found["unpaired"]) == ("cmp2/lpl", "3", None)


def test_a_card_has_the_colour_of_the_sentence() -> None:
    """A lower validation loss alone is not good."""
    paired = entries(BETTER)
    arms = [{"name": "baseline", "baseline": True}, {"name": "lpl", "overrides": {"lpl_weight": 1}}]
    for outcome, colour in (("unknown", ""), ("harms", "bad")):
        content = {"arms": arms, "verdicts": [{"arm": "lpl", "outcome": outcome, "sentence": "."}]}
        [found] = verdicts(content, paired, {"lpl": Group("lpl", "3")})
        assert found["tone"] == colour


def test_a_repeat_of_the_baseline_is_neither_good_nor_bad() -> None:
    found = card(entries(BETTER, NONE, NONE, name="repeat"), repeats=True)
    assert found["tone"] == ""
    told = "At equal steps: another in 1 of 3 figures, by rounding alone, no measurable difference in 2"
    assert found["headlines"] == [told]
    assert found["details"] == ["Another at equal steps: Diffusion loss (raw) −10 %"]


def test_differences_within_the_noise_stand_apart() -> None:
    found = card([*entries(BETTER, noise=NOISE), *entries(BETTER, at="seconds")])
    assert found["tone"] == "good"
    assert found["details"] == [
        "Within the noise at equal steps: Diffusion loss (raw) −10 %",
        "Better at equal training time: Diffusion loss (raw) −10 %",
    ]


def test_the_page_tells_of_chance_and_of_arms_that_are_not_paired(tmp_path: Path) -> None:
    why = "it changes --random_flip"
    arms = [
        {"name": "baseline", "baseline": True},
        {"name": "lpl", "overrides": {}},
        {"name": "flipped", "overrides": {}, "unpaired": why},
    ]
    paired = [*entries(BETTER, NONE, NONE), *entries(BETTER, name="flipped")]
    file = tmp_path / "compare.json"
    result = Result(file, {"kind": "compare", "arms": arms, "paired": paired})
    groups = [Group(str(arm["name"]), "1", arm=str(arm["name"]), comparison=file) for arm in arms]
    page = as_html(gather(Inputs(groups, [result])))
    assert "Of 4 verdicts, about 0.2 would find a difference by chance alone." in page
    assert page.count("Paired by seed; whiskers") == 2  # the note, and the text alternative
    assert page.count(f"Not paired ({why}); whiskers") == 2
    assert page.count(f"against the baseline, not paired: {why}</span>") == 1
