"""Between runs and `lpl eval`: whose samples are kept, which model is checked; and JSON that other programs read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from lpl.comparison import measures
from lpl.comparison.arms import Arm
from lpl.comparison.measures import Measured
from lpl.comparison.run import _json, result
from lpl.config import ModelConfig
from lpl.families import sampling
from lpl.parsing import parse_compare, parse_train
from lpl.testing import tiny_images

LOSS = "validation/raw/diffusion_loss"


@pytest.mark.parametrize("older", [True, False])
def test_samples_of_the_run_before_it_was_trained_on_make_way(tmp_path: Path, older: bool) -> None:
    folder, aside = tmp_path / "eval", tmp_path / ".eval.old"
    for place in (folder / "images", aside / "images"):
        place.mkdir(parents=True)
    (folder / "images" / "0.png").write_bytes(b"x")
    for number, file in enumerate((folder / "samples.json", tmp_path / "finished.json")):
        file.write_text("{}")
        time = 1e9 + (10 * number if older else -10 * number)
        os.utime(file, (time, time))
    measures.drop_stale_samples(tmp_path)
    assert folder.exists() == (not older)
    assert not aside.exists()
    measures.drop_stale_samples(tmp_path)
    assert (folder / "images" / "0.png").is_file() == (not older)


def test_the_reference_is_checked_with_all_options_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ModelConfig] = []
    monkeypatch.setattr(sampling, "check_sampling", lambda model, lora: seen.append(model))
    reference, prompts = tiny_images(tmp_path / "reference", count=10, size=16), tmp_path / "prompts.jsonl"
    (Path(reference) / "metadata.jsonl").unlink()
    prompts.write_text('{"text": "a lamp"}\n')
    own = {"revision": "r", "variant": "fp16", "single_file_config": "c", "cache_dir": "hub"}
    own |= {"pretrained_model_name_or_path": "m/n", "pretrained_vae_model_name_or_path": "v/w"}
    argv = ["--arms=x", f"--reference_dir={reference}", "--resolution=16", "--num_samples=10", f"--prompts={prompts}"]
    options = parse_compare([*argv, f"--output_dir={tmp_path / 'out'}", *(f"--{k}={v}" for k, v in own.items())])
    measures.check_metrics(options, options.train, parse_train)
    assert seen == [ModelConfig(**own)]


def test_compare_json_is_json_whatever_was_measured() -> None:
    def run(seed: int, loss: float, **more: Any) -> Measured:
        row = {"weights": "raw", "step": 10, "diffusion_loss": loss, "diffusion_loss_bins": [loss, 1.0]}
        curve, clock = [(0.0, 1.0), (10.0, loss)], [(0.0, 0.0), (10.0, 10.0)]
        return Measured(seed, f"a/seed-{seed}", 10, 10.0, {LOSS: loss}, {LOSS: curve}, clock, [row], **more)

    arms = [Arm("base", {}, True, {}), Arm("wild", {}, False, {}, yardsticks={"lpl": ("lpl_num_blocks",)})]
    options = parse_compare(["--arms=x", "--validation_samples=2"])
    measured = {"base": [run(0, 0.8), run(1, 0.8)], "wild": [run(0, math.nan), run(1, math.inf)]}
    found = json.loads(_json(result(options, arms, measured, ["before"])), parse_constant=pytest.fail)
    assert found["paired"] == []
    assert found["refused"] == [
        "before",
        f"wild: {LOSS}: not compared at equal steps: not finite in wild",
        f"wild: {LOSS}: not compared at equal training time: not finite in wild",
    ]
    shown = found["arms"][1]
    assert [r["metrics"][LOSS] for r in shown["runs"]] == [None, None]
    assert shown["runs"][0]["validation"][0]["diffusion_loss_bins"] == [None, 1.0]
    assert (shown["yardsticks"], found["arms"][0]["yardsticks"]) == ({"lpl": ["lpl_num_blocks"]}, {})
