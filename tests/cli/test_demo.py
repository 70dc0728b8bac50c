"""`lpl demo` through the command line: both arms, what they share, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import StopRequestedError
from lpl.data.sheets import read_cells
from lpl.demo import run, samples

ARMS = [run.WITHOUT, run.WITH]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Few views, samples and seeds; the folder to give."""
    monkeypatch.setattr(samples, "NUM_VIEWS", 50)
    monkeypatch.setattr(samples, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(run, "NUM_SAMPLES", 50)
    monkeypatch.setattr(run, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(run, "SEEDS", ("0",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "demo"


def test_arms_differ_in_lpl_alone(small: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, steps and everything else are the same; a stop ends the demo as it ends a comparison."""
    import lpl.comparison.run
    from lpl.comparison.arms import read_arms

    found: dict[str, Any] = {}

    def run_compare(options: Any) -> None:
        found.update(options=options, arms=read_arms(options))
        raise StopRequestedError("stopped")

    monkeypatch.setattr(lpl.comparison.run, "run_compare", run_compare)
    monkeypatch.setattr(run, "SEEDS", ("0", "1", "2"))
    code, _, err = run_cli(["demo", "--output_dir", str(small), "--max_train_steps", "5"])
    assert (code, "stopped" in err) == (4, True)
    options, arms = found["options"], found["arms"]
    assert (options.seeds, options.num_samples, options.guidance_scale) == ((0, 1, 2), 50, (1.0, 3.0))
    assert [(arm.name, arm.baseline) for arm in arms] == [(run.WITHOUT, True), (run.WITH, False)]
    for seed in options.seeds:
        without, with_lpl = (arm.configs[seed].flat() for arm in arms)
        assert {n for n in without if without[n] != with_lpl[n]} == {"use_lpl", "output_dir"}
        assert (with_lpl["use_lpl"], with_lpl["seed"], with_lpl["max_train_steps"]) == (True, seed, 5)
        assert (with_lpl["lpl_norm_type"], with_lpl["lpl_target_share"], with_lpl["lpl_weight"]) == (
            "own",
            0.5,
            "auto",
        )


@pytest.mark.slow
def test_goes_on_where_it_was_stopped(small: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its second run, then repeated: the page compares both arms, figures and pictures."""
    import lpl.cli

    train, seen = lpl.cli.run_train, []

    def stopped(config: Any) -> None:
        seen.append(config)
        if len(seen) == 2:
            raise StopRequestedError("stopped")
        train(config)

    argv = ["demo", "--output_dir", str(small), "--max_train_steps", "2"]
    monkeypatch.setattr(lpl.cli, "run_train", stopped)
    assert run_cli(argv)[0] == 4
    code, out, err = run_cli(argv)
    assert code == 0, err
    assert out.count("nothing to do") == 1
    compared = json.loads((small / "compared" / "compare.json").read_text())
    assert [arm["name"] for arm in compared["arms"]] == ARMS
    assert [run["steps"] for arm in compared["arms"] for run in arm["runs"]] == [2, 2]
    assert {(row["arm"], row["guidance"]) for row in compared["rows"]} == {(a, g) for a in ARMS for g in (1, 3)}
    (verdict,) = compared["verdicts"]
    assert verdict["by"] == "samples"
    assert verdict["sentence"] in out
    page = (small / "compared" / "report.html").read_text()
    assert verdict["sentence"] in page
    assert page.count("a tabby cat with green eyes, centre, guidance 3") >= 3  # real, without and with
    assert f"Page: {small / 'compared' / 'report.html'}" in out.splitlines()[-1]
    assert (small / "samples.png").is_file()
    kinds = [{c.kind for c in read_cells(small / "compared" / arm / "seed-0/samples/step-1.png")} for arm in ARMS]
    assert kinds == [{"without LPL"}, {"with LPL"}]
