"""Charts by timestep bin set arms against the baseline where both measure the same."""

from __future__ import annotations

from pathlib import Path

from lpl.report.curves import loss_charts
from lpl.report.runs import RunFolder
from lpl.report.sources import Group


def test_arms_are_set_against_their_own_comparison() -> None:
    """Two comparisons with arms at half and at twice their own baseline's loss, and a run of none."""
    factors = {"base": 1.0, "lpl": 0.5, "cmp2/base": 10.0, "cmp2/lpl": 20.0, "alone": 3.0}
    groups = [group(name, str(i + 1), factor) for i, (name, factor) in enumerate(factors.items())]
    for one in groups[:4]:
        one.baseline = one.name.endswith("base")
        one.comparison = Path("cmp2" if one.name.startswith("cmp2") else "cmp") / "compare.json"
    start = "Diffusion loss: change by timestep bin, against "
    found = {c.title.removeprefix(start): c.rows[0][1:] for c in loss_charts(groups) if c.title.startswith(start)}
    assert found == {"base": ["−50"], "cmp2/base": ["100"], "before training": ["0"]}


def group(name: str, slot: str, factor: float, redefined: tuple[str, ...] = ()) -> Group:
    rows = [
        {"step": step, "weights": "raw", "edges": [0, 500, 1000], "samples": 2, "diffusion_loss": factor,
         "diffusion_loss_bins": [factor, factor], "lpl": factor, "lpl_bins": [factor, None]}
        for step in (0, 10)
    ]  # fmt: skip
    run = RunFolder(Path(name), {}, {}, 10, "raw", rows, {})
    return Group(name, slot, [run], [0], baseline=slot == "1", redefined=redefined)


def test_only_metrics_of_the_same_definition_are_drawn_together() -> None:
    groups = [group("base", "1", 1.0), group("deep", "2", 0.5, ("lpl",)), group("alike", "3", 2.0)]
    labels = {chart.title: [label for label, _ in chart.legend] for chart in loss_charts(groups)}
    assert labels["Diffusion loss by timestep bin"] == ["before training", "base", "deep", "alike"]
    assert labels["LPL by timestep bin"] == ["before training", "base", "alike"]
    assert labels["LPL, validation"] == ["base", "alike"]
    assert labels["Diffusion loss: change by timestep bin"] == ["deep", "alike"]
    # a single line needs no legend
    changes = next(c for c in loss_charts(groups) if c.title == "LPL: change by timestep bin")
    assert "deep" not in changes.svg
    assert changes.rows[0][1] == "100"
    for one in groups:  # with several seeds, too
        one.runs *= 2
    labels = {chart.title: [label for label, _ in chart.legend] for chart in loss_charts(groups)}
    assert labels["Diffusion loss, validation: change"] == ["base", "deep", "alike"]
    assert labels["LPL, validation: change"] == ["base", "alike"]
