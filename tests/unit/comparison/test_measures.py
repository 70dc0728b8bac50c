"""Between runs and `lpl eval`: whose samples are kept, which model is checked; and JSON that other programs read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from process_state import fresh_process_state
from tiny_models import tiny_images

from lpl.base.errors import UserError
from lpl.base.json_files import write_json
from lpl.comparison import measures
from lpl.comparison.arms import Arm, check_same_data
from lpl.comparison.measures import RunMetrics
from lpl.comparison.run import result
from lpl.comparison.verdict import result_table
from lpl.config import ModelConfig
from lpl.config.command_line import parse_compare
from lpl.evaluation.planning import prompts_digest
from lpl.families import sampling

LOSS = "validation/raw/diffusion_loss"


def check(options: Any, *ended: Any) -> None:
    with fresh_process_state():
        measures.check_metrics(options, options.train, ended)


@pytest.mark.parametrize(("older", "point"), [(True, ""), (False, ""), (True, "points/guidance-3-steps-4")])
def test_samples_of_the_run_before_it_was_trained_on_make_way(tmp_path: Path, older: bool, point: str) -> None:
    folder = tmp_path / "eval" / point
    drawn, mine = folder / "images" / "00000" / "00000003.png", folder / "images" / "mine.png"
    for file in (drawn, mine):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    for number, file in enumerate((folder / "samples.json", tmp_path / "finished.json")):
        file.write_text("{}")
        time = 1e9 + (10 * number if older else -10 * number)
        os.utime(file, (time, time))
    for _ in range(2):
        measures.drop_stale_samples(tmp_path)
        assert [path.exists() for path in (drawn, folder / "samples.json")] == [not older] * 2
        assert mine.is_file()
    mine.unlink()
    (folder / "samples.json").touch()
    os.utime(folder / "samples.json", (1, 1))
    measures.drop_stale_samples(tmp_path)
    assert list(folder.iterdir()) == []


def test_the_reference_is_checked_with_all_options_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ModelConfig] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sampling, "check_sampling", lambda model, lora: seen.append(model) or (None, None))
    reference, prompts = tiny_images(tmp_path / "reference", count=10, size=16), tmp_path / "prompts.jsonl"
    (Path(reference) / "metadata.jsonl").unlink()
    prompts.write_text('{"text": "a lamp"}\n')
    own = {"revision": "r", "variant": "fp16", "single_file_config": "c", "cache_dir": "hub"}
    own |= {"pretrained_model_name_or_path": "m/n", "pretrained_vae_model_name_or_path": "v/w"}
    argv = ["--arms=x", f"--reference_dir={reference}", "--resolution=16", "--num_samples=10", f"--prompts={prompts}"]
    options = parse_compare([*argv, f"--output_dir={tmp_path / 'out'}", *(f"--{k}={v}" for k, v in own.items())])
    check(options)
    assert seen == [ModelConfig(**own)]


def test_compare_json_is_json_whatever_was_measured(tmp_path: Path) -> None:
    def run(seed: int, loss: float, **more: Any) -> RunMetrics:
        row = {"weights": "raw", "step": 10, "diffusion_loss": loss, "diffusion_loss_bins": [loss, 1.0]}
        curve, clock = [(0.0, 1.0), (10.0, loss)], [(0.0, 0.0), (10.0, 10.0)]
        return RunMetrics(seed, f"a/seed-{seed}", 10, 10.0, {LOSS: loss}, {LOSS: curve}, clock, [row], **more)

    wild = Arm("wild", {}, False, {}, unpaired=("train_batch_size",), redefined={"lpl": ("lpl_num_blocks",)})
    arms = [Arm("base", {}, True, {}), wild]
    options = parse_compare(["--arms=x", "--validation_samples=2"])
    measured = {"base": [run(0, 0.8), run(1, 0.8)], "wild": [run(0, math.nan), run(1, math.inf)]}
    write_json(tmp_path / "compare.json", result(options, arms, measured, ["before"]), "--output_dir x")
    found = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    assert found["paired"] == []
    assert found["refused"] == [
        "before",
        f"wild: {LOSS}: not compared at equal steps: not finite in wild",
        f"wild: {LOSS}: not compared at equal training time: not finite in wild",
    ]
    shown = found["arms"][1]
    assert [arm["unpaired"] for arm in found["arms"]] == [None, "it changes --train_batch_size"]
    assert [r["metrics"][LOSS] for r in shown["runs"]] == [None, None]
    assert shown["runs"][0]["validation"][0]["diffusion_loss_bins"] == [None, 1.0]
    assert (shown["yardsticks"], found["arms"][0]["yardsticks"]) == ({"lpl": ["lpl_num_blocks"]}, {})


def test_the_table_says_which_arms_are_not_paired() -> None:
    def run(seed: int, loss: float) -> RunMetrics:
        return RunMetrics(seed, "", 10, 10.0, {LOSS: loss}, {LOSS: [(0.0, 1.0), (10.0, loss)]}, [(0.0, 0.0)], [])

    arms = [Arm("base", {}, True, {}), Arm("lpl", {}, False, {}), Arm("large", {}, False, {}, unpaired=("resolution",))]
    measured = {arm.name: [run(0, 0.8 - 0.1 * i), run(1, 0.8)] for i, arm in enumerate(arms)}
    lines = result_table(result(parse_compare(["--arms=x", "--validation_samples=2"]), arms, measured, [])).splitlines()
    assert "lpl against the baseline, paired by seed:" in lines
    assert "large against the baseline, not paired (it changes --resolution):" in lines


def test_runs_of_other_data_are_no_pair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = tmp_path / "base" / "seed-0", tmp_path / "lpl" / "seed-0"
    for time, (folder, data) in enumerate(((first, "a"), (second, "b")), 1_000_000_000):
        folder.mkdir(parents=True)
        (folder / "finished.json").write_text(json.dumps({"step": 1, "weights": "raw", "data": data}))
        os.utime(folder / "finished.json", (time, time))
    for pair in ((first, second), (second, first)):
        with pytest.raises(UserError) as caught:
            check_same_data(*pair)
        assert str(caught.value).startswith(f"{second}: was trained on other images or captions than {first}, which")
        assert f"restore the data and remove {second}, or remove {first}" in str(caught.value)
        assert "\n" not in str(caught.value)
    check_same_data(first, first)
    (first / "finished.json").write_text(json.dumps({"step": 1, "weights": "raw", "data": "b"}))
    check_same_data(second, first)
    assert not caplog.records
    (first / "finished.json").write_text(json.dumps({"step": 1, "weights": "raw"}))
    check_same_data(second, first)
    assert [record.message for record in caplog.records] == [
        f"{first}: finished.json does not say on which data it was trained; that is not compared"
    ]


def test_old_samples_of_other_prompts_are_refused_before_training(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs that are trained further they make way; others go by what the user of a comparison can do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reference, prompts = tiny_images(tmp_path / "reference", count=10, size=16), tmp_path / "p.txt"
    prompts.write_text("a lamp\n")
    argv = ["--arms=x", f"--reference_dir={reference}", "--resolution=16", "--num_samples=10", f"--prompts={prompts}"]
    argv += [f"--pretrained_model_name_or_path={model}", f"--output_dir={tmp_path / 'lpl' / 'seed-0'}"]
    options = parse_compare(argv)
    run = tmp_path / "lpl" / "seed-0"
    (run / "eval" / "images").mkdir(parents=True)
    (run / "finished.json").write_text("{}")
    settings = {"resolution": 16, "prompts": prompts_digest(("a lamp",))}
    (run / "eval" / "samples.json").write_text(json.dumps(settings))
    check(options, options.train)
    (run / "eval" / "samples.json").write_text(json.dumps(settings | {"prompts": "others"}))
    with pytest.raises(UserError) as caught:
        check(options, options.train)
    told = str(caught.value)
    assert told.startswith(f"--output_dir {run / 'eval'}: has samples that were drawn otherwise (prompts others -> ")
    assert told.endswith("or remove the folder eval of every run, so that all samples are drawn anew")
    assert "choose another folder" not in told
    check(options)
    os.utime(run / "eval" / "samples.json", (1e9, 1e9))
    check(options, options.train)
