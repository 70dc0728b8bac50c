"""What a run's folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.config.files import write_config
from lpl.report.curves import loss_charts
from lpl.report.page import configuration, tiles
from lpl.report.runs import RunFolder, interpolate, is_run, read_run, training_clock
from lpl.report.sources import Group, Inputs


def run(scalars: dict[str, Any], processes: int = 1, **options: Any) -> RunFolder:
    return RunFolder(Path("run"), TrainConfig().flat() | options, {"processes": processes}, 30, "raw", [], scalars)


def test_the_clock_counts_training_alone() -> None:
    """6 samples a step: 10 steps at 30 a second take 2 s, 5 steps at 15 a second 2 s more; start and gaps are out."""
    rates = {"samples_per_second": [(1, 0.5), (10, 30.0), (15, 15.0)]}
    found = training_clock(run(rates, 2, train_batch_size=3, gradient_accumulation_steps=1))
    assert [step for step, _ in found] == [0, 1, 10, 15]
    assert [seconds for _, seconds in found] == pytest.approx([0, 0.2, 2, 4])


def test_no_logs_no_clock() -> None:
    assert training_clock(run({})) == [(0, 0.0)]


def test_seconds_of_steps_between_logs() -> None:
    clock = [(0, 0.0), (10, 2.0), (15, 4.0)]
    assert [interpolate(clock, step) for step in (0, 5, 10, 12, 15)] == pytest.approx([0, 1, 2, 2.8, 4])
    assert interpolate(clock, 16) is None


def test_validation_is_drawn_over_training_time_too() -> None:
    """Two seeds that take 1 and 3 minutes for 10 steps: 2 minutes on average; without logs there is no such chart."""
    rows = [{"step": s, "weights": "raw", "diffusion_loss": v} for s, v in ((0, 0.5), (10, 0.4), (20, 0.3))]

    def logged(rate: float | None) -> RunFolder:
        scalars = {} if rate is None else {"samples_per_second": [(5, rate), (20, rate)]}
        one = run(scalars, train_batch_size=6, gradient_accumulation_steps=1)
        return RunFolder(one.path, one.options, one.environment, 20, "raw", rows, one.scalars)

    charts = {
        c.title: c for c in loss_charts([Group("a", "1", [logged(1.0), logged(1 / 3)]), Group("b", "2", [logged(1.0)])])
    }
    timed = charts["Diffusion loss, validation: change, over training time"]
    assert timed.header == ["training time, min", "a", "b"]
    assert timed.rows == [["0", "0", "0"], ["1", "–", "−20"], ["2", "−20", "−40"], ["4", "−40", "–"]]
    assert charts["Diffusion loss, validation: change"].header == ["optimizer steps", "a", "b"]
    alone = [c.title for c in loss_charts([Group("a", "1", [logged(None)])])]
    assert alone == ["Diffusion loss, validation"]


def test_a_folder_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    write_config(TrainConfig(), tmp_path, 3)
    rows = [{"step": 4, "weights": "raw", "diffusion_loss": 0.5}, {"step": 0, "weights": "raw", "diffusion_loss": 1.0}]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nbroken\n")
    found = read_run(tmp_path)
    assert is_run(tmp_path)
    assert found.environment["processes"] == 3
    assert [row["step"] for row in found.validation] == [0, 4]
    assert (found.finished_step, found.last_step) == (None, 4)
    assert any("line 3: is no row" in line for line in found.skipped)
    assert any("has not ended" in line for line in found.skipped)
    assert any("no TensorBoard logs" in line for line in found.skipped)
    (tmp_path / "finished.json").write_text('{"step": 9, "weights": "ema"}')
    again = read_run(tmp_path)
    assert (again.finished_step, again.final_weights, again.last_step) == (9, "ema", 9)


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert not is_run(tmp_path)
    with pytest.raises(UserError, match="was not written by lpl train"):
        read_run(tmp_path)


def test_configuration_tells_what_differs() -> None:
    groups = [Group("a", "1", [run({}, lpl_weight=1.0, use_ema=True)]), Group("b", "2", [run({}, use_ema=True)])]
    found = configuration(groups)
    assert found["What differs"].rows == [["lpl_weight", "1", "auto", "auto"]]
    assert found["Set alike in all"].rows == [["use_ema", "yes", "no"]]
    assert len(found["All options"].rows) == len(TrainConfig().flat())
    alone = configuration(groups[:1])["Set by the user"].rows
    assert alone == [["lpl_weight", "1", "auto"], ["use_ema", "yes", "no"]]


def test_tiles_of_a_run() -> None:
    rows = [{"step": s, "weights": "raw", "samples": 4, "diffusion_loss": v} for s, v in ((0, 0.5), (30, 0.45))]
    one = run({"lpl/gradient_share": [(1, 0.9), (2, 0.2), (3, 0.3)]})
    filled = RunFolder(one.path, one.options, one.environment, 30, "raw", rows, one.scalars)
    shown = {tile.label: tile for tile in tiles(Inputs([Group("a", "1", [filled])]))}
    assert shown["Diffusion loss, validation"].value == "−10 %"
    assert shown["Diffusion loss, validation"].tone == "good"
    assert shown["LPL's share of the gradient"].value == "25 %"
    assert shown["Optimizer steps"].value == "30"
