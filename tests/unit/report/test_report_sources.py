"""What is drawn as one: an evaluation of each run, arms of one comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpl.config import TrainConfig
from lpl.config.files import write_config
from lpl.report.evaluations import metric_charts
from lpl.report.page import as_html, gather, title
from lpl.report.sources import read_inputs

NAME = "Fréchet distance (lite0)"


def make_run(folder: Path, **evals: float) -> Path:
    """A run with evaluations of one setting, by the names of their folders."""
    folder.mkdir(parents=True)
    write_config(TrainConfig(), folder)
    for name, value in evals.items():
        (folder / name).mkdir()
        metric = {"value": value, "interval": [value - 1, value + 1], "lower_is_better": True}
        content = {"kind": "eval", "metrics": {"frechet_lite0": metric}, "model": str(folder)}
        (folder / name / "eval.json").write_text(json.dumps(content))
    return folder


def make_comparison(home: Path, factor: float = 1.0, **further: float) -> Path:
    arms = []
    for arm, value in (("baseline", 40.0), ("lpl", 38.0)):
        for seed in (0, 1):
            others = {name: other + seed for name, other in further.items()}
            make_run(home / arm / f"seed-{seed}", eval=factor * (value + seed), **others)
        runs = [{"seed": seed, "folder": f"{arm}/seed-{seed}"} for seed in (0, 1)]
        arms.append({"name": arm, "baseline": arm == "baseline", "overrides": {}, "runs": runs})
    differences = {"difference": -factor, "baseline": 40.0, "interval": [-2.0 * factor, -0.5], "noise": None}
    entry = {"arm": "lpl", "metric": "frechet_lite0", "abscissa": "steps", "outcome": "better", "verdict": "better"}
    content = {"kind": "compare", "arms": arms, "paired": [entry | differences]}
    (home / "compare.json").write_text(json.dumps(content))
    return home


def values(*folders: Path) -> dict[str, str]:
    """The Fréchet distances that are drawn, by group."""
    [chart] = metric_charts(read_inputs([str(folder) for folder in folders]).groups)
    assert chart.title == NAME
    return {row[0]: " ".join(row[1:3]) for row in chart.rows}


def test_further_evaluations_of_a_run_are_groups_of_their_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "my_lora", **{"eval": 38.5, "eval-train": 10.0})
    assert values(folder) == {"my_lora": "38.5 [37.5, 39.5]", "my_lora/eval-train": "10 [9, 11]"}
    inputs = read_inputs([str(folder)])
    assert title(inputs) == f"{tmp_path.name}/my_lora"
    assert [len(group.runs) for group in inputs.groups] == [1, 0]
    assert inputs.groups[0].slot != inputs.groups[1].slot


def test_the_only_evaluation_of_a_run_is_its_own_whatever_its_name(tmp_path: Path) -> None:
    assert values(make_run(tmp_path / "a", held=3.0)) == {"a": "3 [2, 4]"}
    both = make_run(tmp_path / "b", held=3.0, train=1.0)
    assert values(both) == {"b/held": "3 [2, 4]", "b/train": "1 [0, 2]"}


def test_an_arm_is_the_mean_of_one_evaluation_of_each_run(tmp_path: Path) -> None:
    """t(0.975, 1) = 12.706: half of the interval of 38 and 39 is 12.706 · 0.5."""
    home = make_comparison(tmp_path / "cmp", **{"eval-train": 10.0})
    assert values(home) == {
        "baseline": "40.5 [34.1, 46.9]", "lpl": "38.5 [32.1, 44.9]",
        "baseline/eval-train": "10.5 [4.15, 16.9]", "lpl/eval-train": "10.5 [4.15, 16.9]",
    }  # fmt: skip


def test_two_comparisons_keep_their_arms_apart(tmp_path: Path) -> None:
    homes = [make_comparison(tmp_path / "cmp"), make_comparison(tmp_path / "cmp2", 2.0)]
    lone = make_run(tmp_path / "runs" / "lpl", eval=7.0)
    found = values(*homes, lone)
    assert list(found) == ["baseline", "lpl", "cmp2/baseline", "cmp2/lpl", "runs/lpl"]
    assert [text.split()[0] for text in found.values()] == ["40.5", "38.5", "81", "77", "7"]
    inputs = read_inputs([str(folder) for folder in (*homes, lone)])
    assert title(inputs) == "Comparisons: cmp · cmp2"
    assert [inputs.arms(result)["lpl"].name for result in inputs.comparisons] == ["lpl", "cmp2/lpl"]
    page = as_html(gather(inputs))
    assert "<h3>lpl, at equal steps</h3><p>" in page
    assert "<h3>cmp2/lpl, at equal steps</h3><p>" in page
    slots = [group.slot for group in inputs.groups]
    assert slots == ["1", "2", "3", "4", "5"]
    for slot, name in (("2", "lpl"), ("4", "cmp2/lpl")):
        chart = page[page.index(f"<h3>{name}, at equal steps</h3>") :]
        assert f'class="dot s{slot}"' in chart[: chart.index("</figure>")]


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_named_as_an_arm_is_another_column(tmp_path: Path, first: int) -> None:
    folders = [make_comparison(tmp_path / "cmp"), make_run(tmp_path / "runs" / "lpl", eval=7.0)]
    found = values(*(folders[::-1] if first else folders))
    names = ["lpl", "cmp/baseline", "cmp/lpl"] if first else ["baseline", "lpl", "runs/lpl"]
    assert list(found) == names


def test_a_comparison_named_twice_is_read_once(tmp_path: Path) -> None:
    home = make_comparison(tmp_path / "cmp")
    inputs = read_inputs([str(home), str(home / "compare.json")])
    assert [group.name for group in inputs.groups] == ["baseline", "lpl"]


def test_a_folder_named_twice_has_two_names(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", eval=3.0)
    names = [group.name for group in read_inputs([str(folder)] * 2).groups]
    assert len(set(names)) == 2


def test_the_page_says_against_what_was_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "my_lora", eval=3.0)
    page = as_html(gather(read_inputs([str(folder)])))
    assert page.count("<caption>Evaluations</caption>") == 1
    assert f"<td>{folder}</td>" in page
