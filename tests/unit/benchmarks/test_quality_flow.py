"""The quality benchmark's arms of flow matching, trained by a stand-in: which runs there are, and where they begin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality import kept, measure, stages, summary
from benchmarks.quality.arms import candidates_of, merged, read_arms
from benchmarks.quality.flow import FlowStages
from benchmarks.quality.measure import FIGURES, Request, next_points
from benchmarks.quality.results import Results
from benchmarks.quality.stages import Stages
from benchmarks.quality.workers import Workers
from lpl.base.errors import UserError
from lpl.config.command_line import parse_train
from lpl.config.files import as_flags
from lpl.config.run_folder import FINISHED
from lpl.demo.photographs import all_captions
from lpl.demo.weights import load_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


class StandIn(Workers):
    """Training adds 1 to the first bias; distances rise with lpl_target_share. What was trained is listed."""

    def train(self, command: str, options: dict[str, Any], log: Path) -> None:
        self.trained = [*getattr(self, "trained", []), options]
        folder = Path(options["output_dir"])
        shutil.copytree(options["pretrained_model_name_or_path"], folder)
        weights = load_file(folder / UNET)
        weights["conv_in.bias"] += 1
        save_file(weights, folder / UNET, {"format": "pt"})
        (folder / FINISHED).write_text(json.dumps(options))

    def measure(self, run: Path, folder: Path, weights: Path, request: Request, log: Path) -> None:
        options = json.loads((run / FINISHED).read_text()) if (run / FINISHED).is_file() else {}
        rows: list[dict] = []
        while points := next_points(request, rows):
            guidance, steps = points[0]
            distance = abs(guidance - 2) + 9 + options.get("lpl_target_share", 0.5) - options.get("use_lpl", False)
            rows.append(dict.fromkeys(FIGURES, distance) | {"guidance": guidance, "sampling_steps": steps})
        (run / request.file).write_text(json.dumps({"rows": rows}))


@pytest.fixture
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowStages:
    pipeline, weights, benchmark = load_pipeline(), tmp_path / "weights", read_arms()
    pipeline.save_pretrained(tmp_path / "base")
    kept.keep_vae(pipeline.vae, weights)
    kept.keep_pipeline(tmp_path / "base", weights, tuple(all_captions()), benchmark.pretraining.steps)
    for name in ("train", "same", "held-out"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "metadata.jsonl").touch()
    (tmp_path / "data" / "data.json").touch()
    monkeypatch.setattr(stages, "training_seconds", lambda folder: 1.0)
    monkeypatch.setattr(Stages, "_floors", lambda self, samples: None)
    return FlowStages(benchmark, tmp_path, Results(tmp_path / "results.json"), StandIn(number=1))


def test_flow_arms_begin_with_the_unet_that_was_trained_by_flow_matching(flow: FlowStages, tmp_path: Path) -> None:
    main = Stages(read_arms(), tmp_path, flow.results, flow.workers)
    before = main._base()
    with pytest.raises(UserError, match="is not there: run --stage flow first"):
        flow._base()
    flow.flow()
    trained: list[dict] = flow.workers.trained  # type: ignore[attr-defined]
    first, arms = trained[0], trained[1:]
    begun, base = Path(first["pretrained_model_name_or_path"]), flow._base()
    assert (first["max_train_steps"], first["use_lpl"], first["train_batch_size"]) == (2000, False, 16)
    assert {run["pretrained_model_name_or_path"] for run in arms} == {str(base)}
    assert {run["max_train_steps"] for run in arms} == {500}
    for folder in (begun, base, Path(arms[0]["output_dir"])):
        said = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert (said["use_flow_sigmas"], said["prediction_type"]) == (True, "flow_prediction")
    was, now = load_file(begun / UNET), load_file(base / UNET)
    wanted = (was["conv_in.bias"] + 1).half().float()
    assert torch.equal(now["conv_in.bias"], wanted)
    assert torch.equal(now["conv_in.weight"], was["conv_in.weight"])
    assert main._base() == before  # the other arms begin where they did
    assert kept.kept_pipeline(flow.weights).scheduler.config.prediction_type == "epsilon"


def test_flow_arms_are_searched_and_reported_under_their_own_names(flow: FlowStages) -> None:
    flow.flow()
    rows, trained = flow.results.rows, flow.workers.trained  # type: ignore[attr-defined]
    assert len(trained) == 1 + 4 + 3 * 3
    found = {(row["arm"], row["seed"], row["reported"]) for row in rows}
    searched = {("flow-pretrained", 100, False), ("flow-lpl", 101, False)}
    arms = {(f"flow-{arm}", seed, True) for arm in ("baseline", "lpl", "lpl-default") for seed in (1, 2, 3)}
    assert found == searched | arms
    assert {row["samples"] for row in rows} == {500}
    best = flow.results.content["flow_best"]
    assert best["lpl"] == best["lpl-default"] | {"lpl_norm_type": "channel", "lpl_target_share": 0.25}
    assert best["lpl-default"] == merged(best["baseline"], {"use_lpl": True, "lpl_norm_type": "own"})
    assert {row["guidance"] for row in rows if row["reported"]} == {1.5, 2, 3}  # on to the neighbours of the best
    flow.flow()
    assert len(flow.workers.trained) == len(trained)  # type: ignore[attr-defined]


def test_tables_do_not_mix_flow_arms_with_the_others(flow: FlowStages) -> None:
    flow.flow()
    content = flow.results.content
    assert summary.part(content, False)["rows"] == []
    assert summary.arms_of(summary.part(content, True)["rows"]) == ["baseline", "lpl", "lpl-default"]
    text = summary.summary(content)
    assert "## 20 sampling steps" not in text
    ratios = text.partition("## Flow matching, 20 sampling steps")[2]
    assert "| lpl / baseline | 3 |" in ratios
    assert "flow-" not in text


def test_every_option_of_the_flow_arms_is_one_of_lpl_train() -> None:
    benchmark = read_arms()
    how = benchmark.flow
    best = merged(how.baseline.start, how.lpl.start)
    tried = [how.pretraining, how.baseline.start, best]
    tried += [options for choices in how.lpl.rounds.values() for options in candidates_of(best, choices)[1:]]
    assert len(tried) == 6
    for options in tried:
        parse_train(as_flags({name: str(value) for name, value in merged(benchmark.common, options).items()}))


def test_flow_samples_go_through_the_sigmas_of_the_flow() -> None:
    sampler = measure.open_sampler_of(kept.as_flow(load_pipeline()))
    scheduler = sampler.pipeline.scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.999, 0.74925, 0.4995, 0.24975, 0]))
    assert scheduler.config.algorithm_type == "dpmsolver++"
