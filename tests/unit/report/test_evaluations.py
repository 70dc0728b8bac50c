"""Only evaluations of one setting are drawn together; curves over guidance, the best marked; and their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.report.evaluations import evaluation_table, metric_charts, point_charts, point_tables, spectrum_charts
from lpl.report.page import as_html, gather
from lpl.report.sources import Group, Inputs, Result


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


NAME = "frechet_efficientnet-lite0"


def measured(curves: dict[int, dict[float, float]], width: float = 1.0) -> Result:
    points = [
        {"guidance_scale": g, "num_inference_steps": steps, "metrics": {
            NAME: {"value": v, "interval": [v - width, v + width]}, "recall": {"value": v / 100, "interval": None},
        }}
        for steps, curve in curves.items() for g, v in curve.items()
    ]  # fmt: skip
    content = {"num_samples": 100, "reference": "real", "num_reference": 60, "resolution": 64, "features": "lite0"}
    return Result(Path("eval.json"), {"kind": "eval", "metrics": {}, "images": []} | content | {"points": points})


def arms() -> list[Group]:
    base = [measured({20: {1.0: 50 + s, 3.0: 30 + s, 5.0: 40 + s}, 4: {1.0: 9.0 + s, 3.0: 8.0 + s}}) for s in range(3)]
    ours = [measured({20: {1.0: 40 + s, 3.0: 31 + s, 5.0: 45 + s}, 4: {1.0: 7.0 + s, 3.0: 8.0 + s}}) for s in range(3)]
    return [Group("base", "1", evals=base, baseline=True), Group("lpl", "2", evals=ours)]


def test_a_panel_for_each_number_of_steps_with_a_line_for_each_arm() -> None:
    charts = {chart.title: chart for chart in point_charts(Inputs(groups=arms()))}
    assert list(charts) == [f"{name} over guidance, {steps} steps" for steps in (20, 4)
                            for name in ("Fréchet distance", "Recall")]  # fmt: skip
    chart = charts["Fréchet distance over guidance, 20 steps"]
    assert chart.legend == [("base", "1"), ("lpl", "2")]
    assert chart.rows == [["1", "51", "41"], ["3", "31", "32"], ["5", "41", "46"]]
    assert chart.svg.count('class="band') == 2
    assert [chart.svg.count(f'class="best s{slot}"') for slot in (1, 2)] == [1, 1]
    assert chart.key == [("swatch-best", "the best guidance by Fréchet distance")]
    assert "bands of 95 % over seeds (t)" in chart.note
    few = charts["Recall over guidance, 4 steps"].svg
    assert 'class="best s1"' in few  # at the guidance that is best by Fréchet distance
    [(caption, table)] = point_tables(Inputs(groups=arms()))
    assert (caption, len(table.rows)) == ("Every point", 10)
    # t(0.975, 2) = 4.303: half of the interval of 30, 31 and 32 is 4.303 / sqrt(3).
    assert table.rows[1][:6] == ["base", "20", "3 (best)", "31", "[28.5, 33.5]", "–"]
    assert [row[2] for row in table.rows if row[0] == "lpl"] == ["1", "3 (best)", "5", "1 (best)", "3"]


def test_one_run_has_the_bands_of_its_samples_and_one_point_a_bar() -> None:
    [chart, _] = point_charts(Inputs(groups=[Group("a", "1", evals=[measured({4: {1.0: 5.0, 3.0: 4.0}})])]))
    assert "95 % by the bootstrap over samples" in chart.note
    groups = [Group("a", "1", evals=[measured({4: {3.0: 4.0}, 8: {3.0: 4.0}})])]
    assert 'class="whisker s1"' in point_charts(Inputs(groups=groups))[0].svg
    two = [Group("a", "1", evals=[measured({4: {1.0: v, 3.0: 4.0}}) for v in (5.0, 6.0)])]
    assert "from the lowest to the highest" in point_charts(Inputs(groups=two))[0].note


def test_an_evaluation_of_one_point_has_no_curves() -> None:
    one = measured({4: {1.0: 5.0}})
    del one.content["points"]
    inputs = Inputs(groups=[Group("a", "1", evals=[one])])
    assert (point_charts(inputs), point_tables(inputs)) == ([], [])


@pytest.mark.parametrize(("outcome", "tone"), [("helps", "good"), ("harms", "bad"), ("mixed", "mixed"), ("none", "")])
def test_a_comparison_by_itself_has_the_sentence_on_top_and_its_points(outcome: str, tone: str) -> None:
    rows = [
        {"arm": arm, "seed": 0, "guidance": g, "sampling_steps": 8, "frechet": f, "recall": 0.5}
        for arm, f in (("base", 5.0), ("lpl", 4.0)) for g in (1.0, 3.0)
    ]  # fmt: skip
    best: dict[str, Any] = {"arm": "lpl", "sampling_steps": 8, "seeds": [0], "guidance": [3.0], "scales": [1.0, 3.0]}
    best |= {"baseline_guidance": [1.0], "frechet": {"ratio": 0.8, "interval": None}}
    content = {
        "kind": "compare", "arms": [{"name": "base", "baseline": True}, {"name": "lpl"}], "paired": [], "rows": rows,
        "at_best": [best], "verdicts": [{"arm": "lpl", "outcome": outcome, "sentence": "lpl <b> helps."}],
    }  # fmt: skip
    result = Result(Path("compare.json"), content)
    groups = [Group(name, "1", arm=name, comparison=result.file) for name in ("base", "lpl")]
    page = as_html(gather(Inputs(groups=groups, comparisons=[result])))
    assert f'<p class="sentence {tone}">lpl &lt;b&gt; helps.</p>' in page
    assert page.index("helps.</p>") < page.index("Fréchet distance over guidance, 8 steps")
    assert "<td>1 → 3</td><td>0.8</td>" in page
