"""The quality benchmark's parts that decide what its figures mean."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality import arms, kept, photographs, summary
from benchmarks.quality.arms import Arm, Run, read_arms
from benchmarks.quality.control import LatentSquaredDistance
from benchmarks.quality.decoder import Crops
from benchmarks.quality.fetch import Counts, fetch
from benchmarks.quality.results import Results
from benchmarks.quality.run import parse, run
from benchmarks.quality.stages import Stages, is_past_steep_phase
from benchmarks.quality.workers import BudgetSpentError, Workers
from lpl.cli import parse_train
from lpl.config_io import as_flags
from lpl.errors import UserError


def test_control_gradient_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    pred, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    out = LatentSquaredDistance()(pred, y)
    wanted = (plain - y).square().mean((1, 2, 3))
    assert torch.allclose(out.per_sample, wanted, rtol=1e-6)
    (weights * out.per_sample).sum().backward()
    (weights * wanted).sum().backward()
    assert torch.allclose(pred.grad, plain.grad, rtol=1e-6, atol=1e-9)
    (each,) = torch.autograd.grad((plain - y).square().mean((1, 2, 3)).sum(), plain)
    assert torch.allclose(out.gradient, each, rtol=1e-6, atol=1e-9)
    assert torch.equal(out.per_layer["latent"], out.per_sample.detach())
    assert LatentSquaredDistance()(x, y).gradient is None


def test_control_refuses_what_it_does_not_take() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="no mask"):
        LatentSquaredDistance()(x, x, torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="one shape"):
        LatentSquaredDistance()(x, x[:, :2])


def test_every_option_of_arms_is_one_of_lpl_train() -> None:
    benchmark = read_arms()
    assert [s.name for s in benchmark.settings] == ["all-64", "quarter-64", "all-96"]
    number, best = 0, {}
    for arm in (benchmark.baseline, benchmark.lpl):
        best = arms.merged(best, arm.start)
        for choices in arm.rounds.values():
            for options in arms.candidates_of(best, choices)[1:]:
                texts = {name: str(value) for name, value in arms.merged(benchmark.common, options).items()}
                parse_train(as_flags(texts))
                number += 1
    assert number == 7 + 16


def test_search_goes_on_with_the_best_of_each_round() -> None:
    arm = Arm({"a": 1, "b": 1}, {"a": [{"a": 2}, {"a": None}], "b": [{"b": 3}, {"b": 1}]})
    tried = []

    def score(candidates: list[dict]) -> list[float]:
        tried.append(candidates)
        return [{1: 5.0, 2: 4.0}.get(o.get("a"), 6.0) + o["b"] for o in candidates]

    assert arms.search(arm, {"c": 0}, score) == {"a": 2, "b": 1, "c": 0}
    assert tried[0] == [{"a": 1, "b": 1, "c": 0}, {"a": 2, "b": 1, "c": 0}, {"b": 1, "c": 0}]
    assert tried[1] == [{"a": 2, "b": 1, "c": 0}, {"a": 2, "b": 3, "c": 0}]


def test_results_know_a_run_again(tmp_path: Path) -> None:
    primary, other = read_arms().settings[:2]
    results = Results(tmp_path / "results.json", primary, {})
    made = Run(primary, "lpl", 1, True, 10, 64, {"use_lpl": True})
    results.add(made, {"frechet": 2.0, "seconds": 5.0})
    results.add(Run(other, "lpl", 1, True, 10, 64, {"use_lpl": True}), {"frechet": 3.0, "seconds": 50.0})
    again = Results(tmp_path / "results.json", primary, {})
    assert [row["arm"] for row in again.rows] == ["lpl", "lpl@quarter-64"]
    assert again.find(made)["frechet"] == 2.0
    assert again.seconds_per_step("lpl") == 0.5
    assert again.find(Run(primary, "lpl", 1, True, 10, 64, {"use_lpl": True, "lpl_scale": False})) is None
    assert again.find(replace(made, samples=65)) is None


def test_kept_weights_make_the_pipeline_again(tmp_path: Path) -> None:
    from lpl.demo.weights import load_pipeline

    pipeline = load_pipeline()
    with torch.no_grad():
        for part in (pipeline.unet.conv_out, pipeline.vae.decoder.conv_out):
            part.bias += 0.25
        pipeline.vae.encoder.conv_in.bias += 1.0  # the encoder is not the benchmark's to keep
    pipeline.save_pretrained(tmp_path / "run")
    kept.keep(tmp_path / "run", "lpl", tmp_path / "weights")
    again, shipped = kept.kept_pipeline("lpl", tmp_path / "weights"), load_pipeline()
    for part, wanted in ((again.unet, pipeline.unet), (again.vae.decoder, pipeline.vae.decoder)):
        pairs = zip(part.state_dict().values(), wanted.state_dict().values(), strict=True)
        assert all(torch.equal(x, y.half().float()) for x, y in pairs)
    assert torch.equal(again.vae.encoder.conv_in.bias, shipped.vae.encoder.conv_in.bias)


def test_the_decoders_crops_are_parts_of_the_images(tmp_path: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").resize((80, 80)).convert("RGB").save(tmp_path / "a.png")
    draw = Crops(tmp_path)
    first, again = (draw(6, random.Random(1)) for _ in range(2))
    assert [image.size for image in first] == [(64, 64)] * 6
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    darkest = {image.getpixel((0, 0))[0] for image in first}
    assert len(darkest) > 1, "every crop is the whole image"


def test_search_is_named_by_what_differs() -> None:
    rows = [
        {"arm": "lpl", "seed": 101, "reported": False, "frechet": value, "options": options}
        for value, options in ((5.0, {"a": 1}), (3.0, {"a": 2, "b": True, "lpl_norm_type": "batch"}))
    ]
    found = [said for said, _ in summary.differences(rows, "lpl", None)]
    assert found == ["chosen", "a 1, b unset, lpl_norm_type shared"]
    found = [said for said, _ in summary.differences(rows, "lpl", {"a": 1})]
    assert found == ["a 2, b True, lpl_norm_type batch", "chosen"]


def test_paired_ratio_against_hand() -> None:
    ratio = summary.paired_ratio([0.9, 0.8], [1.0, 1.0])
    logs = math.log(0.9), math.log(0.8)
    half = 12.706205 * abs(logs[0] - logs[1]) / 2  # Student's t with one degree of freedom; s / sqrt(2) = |d| / 2
    assert ratio.value == pytest.approx(math.sqrt(0.72))
    assert ratio.low == pytest.approx(math.exp(sum(logs) / 2 - half), rel=1e-6)
    assert ratio.high == pytest.approx(math.exp(sum(logs) / 2 + half), rel=1e-6)


def row(arm: str, seed: int, value: float, steps: int = 5, samples: int = 10) -> dict:
    figures = {"frechet": value, "high_band_log_error": value}
    return {"arm": arm, "seed": seed, "reported": True, "steps": steps, "samples": samples} | figures


def test_only_runs_of_one_length_and_number_of_samples_are_paired() -> None:
    rows = [row("baseline", 1, 1.0), row("baseline", 2, 1.0), row("lpl", 1, 0.9), row("lpl", 2, 0.9)]
    rows.append(row("wall", 1, 0.95, steps=15) | {"base_steps": 5})
    assert summary.ratio_of(rows, "lpl", "baseline").seeds == 2
    assert summary.ratio_of(rows, "lpl", "wall").value == pytest.approx(0.9 / 0.95)
    longer = [*rows, row("lpl", 1, 0.5, steps=10)]
    assert summary.ratio_of(longer, "lpl", "baseline") is None
    longer.append(row("baseline", 1, 0.8, steps=10))
    assert summary.ratio_of(longer, "lpl", "baseline").value == pytest.approx(0.5 / 0.8)
    assert summary.ratio_of([*rows, row("lpl", 1, 0.9, samples=20)], "lpl", "baseline") is None


def test_rows_of_other_fixed_options_are_not_taken_up(tmp_path: Path) -> None:
    primary = read_arms().primary
    file = tmp_path / "results.json"
    results = Results(file, primary, {"common": {"train_batch_size": 16}})
    results.note("best", {})
    Results(file, primary, {"common": {"train_batch_size": 16}})
    with pytest.raises(UserError, match=r"its rows were made with common .'train_batch_size': 16., not"):
        Results(file, primary, {"common": {"train_batch_size": 32}})


def test_equal_wall_time_is_counted_anew_for_other_steps_or_options(tmp_path: Path) -> None:
    benchmark = read_arms()
    results = Results(tmp_path / "results.json", benchmark.primary, {})
    stages = Stages(benchmark, tmp_path, results, Workers(), tmp_path)
    for arm, seconds in (("baseline", 50.0), ("lpl", 150.0)):
        results.add(Run(benchmark.primary, arm, 1, True, 500, 10, {}), {"seconds": seconds})
    control = benchmark.controls["baseline-wall-time"]
    made = stages._control("baseline-wall-time", control, 1, {"learning_rate": 1e-4})
    assert (made.steps, made.base_steps) == (1500, 500)
    results.add(made, {"seconds": 1.0})
    results.rows[0]["seconds"] = 100.0
    assert stages._control("baseline-wall-time", control, 2, {"learning_rate": 1e-4}).steps == 1500
    assert stages._control("baseline-wall-time", control, 2, {"learning_rate": 2e-4}).steps == 750
    longer = replace(stages, benchmark=replace(benchmark, steps=1000))
    assert longer._control("baseline-wall-time", control, 2, {"learning_rate": 1e-4}).steps == 1500


def test_guided_samples_are_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = read_arms()
    results = Results(tmp_path / "results.json", benchmark.primary, {})
    stages, asked = Stages(benchmark, tmp_path, results, Workers(), tmp_path), []
    (tmp_path / "data" / "64" / "held-out").mkdir(parents=True)
    (tmp_path / "data" / "64" / "held-out" / "metadata.jsonl").touch()

    def measure(*arguments: object) -> dict:
        asked.append(arguments)
        return {"frechet": 2.0}

    monkeypatch.setattr(stages.workers, "measure", measure)
    run_ = stages._run(benchmark.primary, "lpl", 1, {})
    for _ in range(2):
        stages._guided(run_)
    ((folder, _, _, samples, seed, prompts, guidance, steps, _),) = asked
    assert (folder.name, samples, seed, prompts, guidance, steps) == (stages._name(run_), 2000, 1, "all", 2.0, 12)
    assert results.rows == []
    assert [(r["guidance"], r["frechet"]) for r in results.content["guided"]] == [(2.0, 2.0)]


def test_a_setting_has_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, asked = read_arms(), []
    setting = replace(benchmark.primary, steps=7, sampling_steps=3)
    results = Results(tmp_path / "results.json", setting, {})
    stages = Stages(benchmark, tmp_path, results, Workers(), tmp_path)
    (tmp_path / "data" / "64" / "held-out").mkdir(parents=True)
    (tmp_path / "data" / "64" / "held-out" / "metadata.jsonl").touch()
    monkeypatch.setattr(stages.workers, "measure", lambda *arguments: asked.append(arguments))
    made = stages._run(setting, "lpl", 1, {})
    stages._measure(setting, tmp_path, 5, 1, tmp_path / "log")
    assert (made.steps, results.key(made)["sampling_steps"], asked[0][-2]) == (7, 3, 3)
    assert "sampling_steps" not in results.key(stages._run(benchmark.primary, "lpl", 1, {}))


def test_verdict_needs_the_interval_below_one() -> None:
    def rows(ours: tuple[float, ...]) -> list[dict]:
        return [
            row(arm, seed, value)
            for arm, values in (("baseline", (1.0, 1.0, 1.0)), ("lpl", ours))
            for seed, value in enumerate(values)
        ]

    assert "is met" in summary.verdict(rows((0.9, 0.91, 0.89)))
    assert "is not met" in summary.verdict(rows((0.6, 0.7, 1.3)))
    assert "in 2 of 3 seeds" in summary.verdict(rows((0.6, 0.7, 1.3)))


def test_settings_can_be_left_out_but_the_searched_one() -> None:
    found = arms.only_settings(read_arms(), ["all-96", "all-64"])
    assert [s.name for s in found.settings] == ["all-64", "all-96"]
    with pytest.raises(UserError, match="all-64, which is searched, is missing"):
        arms.only_settings(read_arms(), ["all-96"])
    with pytest.raises(UserError, match="all-65 is unknown"):
        arms.only_settings(read_arms(), ["all-64", "all-65"])


def test_published_rows_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    published = summary.FILE.read_bytes()
    with pytest.raises(UserError, match="no baseline there: run --stage baseline first"):
        run(parse(["--stage", "search", "--output_dir", str(tmp_path)]))
    assert summary.FILE.read_bytes() == published


def test_baselines_are_made_after_those_they_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = {"pretraining": {"first": 20, "every": 10, "options": {"train_batch_size": 8}}}
    first, second, third = read_arms().settings
    settings = [first, replace(second, begins_with=None), replace(third, begins_with=second.name, **shorter)]
    benchmark = replace(read_arms(), settings=settings)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    results, trained = Results(tmp_path / "results.json", first, {}), []
    results.keep_baseline(first, {"curve": [{"steps": 1, "frechet": 1.0}], "reached": True})
    for setting in settings[1:]:
        results.keep_baseline(setting, {"floor": {"frechet_train_to_held_out": 1.0}})
        (tmp_path / "data" / str(setting.resolution) / "held-out").mkdir(parents=True)
        (tmp_path / "data" / str(setting.resolution) / "held-out" / "metadata.jsonl").touch()
    stages = Stages(benchmark, tmp_path, results, Workers(), tmp_path / "model", own_model=True)

    def train(command: str, options: dict, log: Path) -> None:
        trained.append(options)
        Path(options["output_dir"]).mkdir(parents=True, exist_ok=True)
        (Path(options["output_dir"]) / "finished.json").touch()

    monkeypatch.setattr(stages, "_prepare", lambda: None)
    monkeypatch.setattr(stages, "_trained_vae", lambda: tmp_path / "data")
    monkeypatch.setattr(stages.workers, "train", train)
    monkeypatch.setattr(stages.workers, "measure", lambda *_: {"frechet": 2.0})
    stages.baseline()
    found = [
        (Path(o["output_dir"]).name, Path(o["pretrained_model_name_or_path"]).name, o["max_train_steps"],
         o["train_batch_size"], o["learning_rate"]) for o in trained
    ]  # fmt: skip
    assert found == [
        ("quarter-64", "model", 2500, 64, 8e-4),
        ("quarter-64", "model", 3000, 64, 8e-4),
        ("all-96", "quarter-64", 20, 8, 8e-4),
        ("all-96", "quarter-64", 30, 8, 8e-4),
    ]
    assert results.baseline(settings[2])["begins_with"] == "quarter-64"
    trained.clear()
    stages.baseline()
    assert trained == []
    (tmp_path / "baselines" / "quarter-64" / "finished.json").unlink()
    results.keep_baseline(third, {"curve": [], "reached": False})
    with pytest.raises(UserError, match="quarter-64: no baseline there: run --stage baseline first"):
        stages.baseline()


def test_a_setting_begins_with_one_before_it(tmp_path: Path) -> None:
    text = arms.ARMS.read_text(encoding="utf-8")
    file = tmp_path / "arms.yaml"
    file.write_text(text.replace("begins_with: all-64", "begins_with: all-96"), encoding="utf-8")
    with pytest.raises(UserError, match="all-96 begins with all-96, which is no setting before it"):
        read_arms(file)
    file.write_text(text.replace("{first: 2500", "{frist: 2500"), encoding="utf-8")
    with pytest.raises(UserError, match="frist"):
        read_arms(file)


def test_workers_tell_faults_from_stops(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(UserError, match=r"benchmarks\.quality\.nothing ended with code 1 .*No module named"):
        Workers().call(["benchmarks.quality.nothing"], log)
    with pytest.raises(BudgetSpentError):
        Workers(budget_minutes=0.0).train("lpl", {}, log)
    stopped = Workers()
    stopped.stop()
    with pytest.raises(BudgetSpentError):
        stopped.call(["benchmarks.quality.nothing"], log)


def test_steep_phase() -> None:
    assert not is_past_steep_phase([10.0], 20.0, 0.05)
    assert not is_past_steep_phase([20.0, 10.0], 15.0, 0.05)
    assert not is_past_steep_phase([20.0, 19.5], 15.0, 0.05)
    assert is_past_steep_phase([15.0, 14.5], 15.0, 0.05)


def test_subjects() -> None:
    assert photographs.subject_of("An African elephant.") == "an African elephant"
    assert photographs.subject_of("A candy cane is a traditional Christmas treat.") == "a candy cane"
    assert photographs.subject_of("A very long name of something that goes on") == "a very long name of"


def test_data_are_split_by_photograph_and_the_same_again(tmp_path: Path) -> None:
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        Image.effect_noise((120, 100), 60 + i).convert("RGB").save(images / f"thing_{i}.png")
    found = []
    for name in ("a", "b"):
        fetch(tmp_path / name, [64, 96], images=images, counts=Counts(2, 20))
        found.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")})
    assert found[0] == found[1]
    folders = {part: {p.name[:-7] for p in (tmp_path / "a/data/64" / part).glob("*.png")} for part in
               ("all", "quarter", "held-out")}  # fmt: skip
    assert len(folders["all"] | folders["held-out"]) == 12
    assert not folders["all"] & folders["held-out"]
    assert folders["quarter"] < folders["all"]
    with pytest.raises(UserError, match="describes other data"):
        fetch(tmp_path / "a", [64, 96], images=images, counts=Counts(3, 20))
