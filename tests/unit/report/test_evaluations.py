"""Only evaluations of one setting are drawn together, and the page says against what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.report.evaluations import evaluation_table, metric_charts, spectrum_charts
from lpl.report.sources import Group, Result


def evaluated(value: float, against: str = "images", **other: Any) -> Result:
    metric = {"value": value, "interval": [value - 1, value + 1], "floor": 2.0, "lower_is_better": True, "note": None}
    content = {
        "model": "models/a", "reference": "photos/held", "num_samples": 1000, "num_reference": 500, "resolution": 64,
        "features": "lite0", "options": {"against": against}, "metrics": {"frechet_lite0": metric},
        "spectrum": {"frequency": [0.1, 0.2], "samples": [value, 1.0], "reference": [2.0, 1.0], "floor": [1.5, 0.9]},
    }  # fmt: skip
    return Result(Path("eval.json"), content | other)


def values(groups: list[Group]) -> dict[str, list[list[str]]]:
    return {chart.title: [row[:2] for row in chart.rows] for chart in metric_charts(groups)}


def test_one_setting_is_one_chart() -> None:
    groups = [Group("a", "1", evals=[evaluated(10.0)]), Group("b", "2", evals=[evaluated(20.0)])]
    assert values(groups) == {"Fréchet distance (lite0)": [["a", "10"], ["b", "20"]]}
    titles = [chart.title for chart in spectrum_charts(groups)]
    assert titles == ["Power spectrum", "Detail against real images"]
    header = ["Evaluation", "Model", "Samples", "Reference", "Its images", "Resolution", "Against", "Features"]
    assert evaluation_table(groups).header == header
    told = ["models/a", "1,000", "photos/held", "500", "64 px", "images", "lite0"]
    assert evaluation_table(groups).rows == [["a", *told], ["b", *told]]


@pytest.mark.parametrize(
    ("other", "first", "second"),
    [
        ({"num_samples": 100}, "1000 samples", "100 samples"),
        ({"reference": "other/held"}, "reference photos/held", "reference other/held"),
        ({"reference": "other/train"}, "reference held", "reference train"),
        ({"num_reference": 60}, "500 images", "60 images"),
        ({"resolution": 128}, "64 px", "128 px"),
        ({"features": "dino"}, "in lite0", "in dino"),
        ({"against": "reconstructions"}, "against images", "against reconstructions"),
    ],
)
def test_other_settings_have_their_own_axis(other: dict[str, Any], first: str, second: str) -> None:
    groups = [Group("a", "1", evals=[evaluated(10.0)]), Group("b", "2", evals=[evaluated(20.0, **other)])]
    name = "Fréchet distance (lite0)"
    assert values(groups) == {f"{name} ({first})": [["a", "10"]], f"{name} ({second})": [["b", "20"]]}
    assert [chart.header[1:] for chart in spectrum_charts(groups)[::2]] == [
        ["real images", "real images through the VAE", "a"],
        ["real images through the VAE", "half of the real images through the VAE", "b"]
        if "against" in other
        else ["real images", "real images through the VAE", "b"],
    ]


def test_references_are_told_apart_by_what_is_in_them() -> None:
    """One folder with other images in it is another reference; one with two names is not."""
    name = "Fréchet distance (lite0)"
    groups = [Group("a", "1", evals=[evaluated(10.0, reference_digest="abcdef01")])]
    groups += [Group("b", "2", evals=[evaluated(20.0, reference_digest="abcdef01", reference="/home/held")])]
    assert values(groups) == {name: [["a", "10"], ["b", "20"]]}
    groups += [Group("c", "3", evals=[evaluated(30.0, reference_digest="98765432")])]
    assert values(groups) == {
        f"{name} (its images abcdef)": [["a", "10"], ["b", "20"]],
        f"{name} (its images 987654)": [["c", "30"]],
    }


def test_arms_whose_metrics_are_defined_otherwise_have_their_own_axis() -> None:
    groups = [Group("a", "1", evals=[evaluated(10.0)]), Group("b", "2", evals=[evaluated(20.0)])]
    groups[1].redefined = ("samples",)
    name = "Fréchet distance (lite0)"
    assert values(groups) == {name: [["a", "10"]], f"{name} (another yardstick)": [["b", "20"]]}


def test_words_follow_what_samples_are_set_against() -> None:
    halves = "the floor: half of the reconstructions against the other half"
    for against, floor, row in (
        ("images", "the VAE's own floor", "images"),
        ("reconstructions", halves, "the VAE's reconstructions of them"),
    ):
        groups = [Group("a", "1", evals=[evaluated(10.0, against)])]
        [chart] = metric_charts(groups)
        assert chart.key == [("swatch-mark", f"{floor} (◂ ▸: beyond the axis)")]
        assert evaluation_table(groups).rows[0][6] == row


def test_runs_of_a_group_give_a_mean_within_a_setting_only() -> None:
    """t(0.975, 1) = 12.706: half of the interval of 10 and 12 is 12.706 · 1."""
    group = Group("a", "1", evals=[evaluated(10.0), evaluated(12.0), evaluated(99.0, num_samples=7)])
    name = "Fréchet distance (lite0)"
    assert [(c.title, c.rows[0][:3]) for c in metric_charts([group])] == [
        (f"{name} (1000 samples)", ["a", "11", "[−1.71, 23.7]"]),
        (f"{name} (7 samples)", ["a", "99", "[98, 100]"]),
    ]
