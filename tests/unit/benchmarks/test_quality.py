"""The quality benchmark's parts that decide what its figures mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.quality import arms, features, fetch, kept, measure, pictures, summary
from benchmarks.quality.arms import Arm, Run, merged, read_arms
from benchmarks.quality.control import LatentDistance
from benchmarks.quality.cost import step_cost
from benchmarks.quality.measure import PictureSet, Request, next_points
from benchmarks.quality.results import Results
from benchmarks.quality.stages import Stages
from benchmarks.quality.workers import BudgetSpentError, DivergedError, Workers
from lpl.base.errors import UserError
from lpl.config.command_line import parse_train
from lpl.config.files import as_flags
from lpl.config.loss import LPLConfig

# What is run.


def test_every_option_of_arms_is_one_of_lpl_train_or_a_variant() -> None:
    from benchmarks.quality.variants import OPTIONS, parse

    benchmark = read_arms()
    number, best = 0, {}
    for arm in (benchmark.baseline, benchmark.lpl):
        best = arms.merged(best, arm.start)
        for choices in arm.rounds.values():
            for options in arms.candidates_of(best, choices)[1:]:
                texts = {name: str(value) for name, value in arms.merged(benchmark.common, options).items()}
                own = [f"--{name}={texts.pop(name)}" for name in list(texts) if name in OPTIONS]
                parse_train(as_flags(texts))
                assert not own or parse(own)[1] == []
                number += 1
    assert number == 2 * 10


def test_the_default_of_the_tables_is_the_default_of_the_package() -> None:
    """Rows keep their options, whatever later versions have as defaults: so arms state them."""
    benchmark = read_arms()
    for stated in (benchmark.controls["lpl-default"].plus, benchmark.flow.default):
        assert LPLConfig(**stated) == LPLConfig()
    for stated in (*(c.plus for c in benchmark.controls.values() if c.plus.get("use_lpl")), benchmark.flow.lpl.start):
        assert "lpl_norm_type" in stated


def test_both_searches_have_as_many_runs(tmp_path: Path) -> None:
    text = arms.ARMS.read_text(encoding="utf-8")
    file = tmp_path / "arms.yaml"
    file.write_text(text.replace(", {variant_diffusion: 0.1}]", "]"), encoding="utf-8")
    with pytest.raises(UserError, match="the baseline's search has 11 runs, LPL's 10: they must be equal"):
        read_arms(file)
    file.write_text(text.replace("search_seed: 101", "search_seed: 3"), encoding="utf-8")
    with pytest.raises(UserError, match="search_seed 3 is among the reported seeds"):
        read_arms(file)


def test_search_goes_on_with_the_best_of_each_round() -> None:
    arm = Arm({"a": 1, "b": 1}, {"a": [{"a": 2}, {"a": None}], "b": [{"b": 3}, {"b": 1}]})
    tried = []

    def score(candidates: list[dict]) -> list[float]:
        tried.append(candidates)
        return [{1: 5.0, 2: 4.0}.get(o.get("a"), 6.0) + o["b"] for o in candidates]

    assert arms.search(arm, {"c": 0}, score) == {"a": 2, "b": 1, "c": 0}
    assert tried[0] == [{"a": 1, "b": 1, "c": 0}, {"a": 2, "b": 1, "c": 0}, {"b": 1, "c": 0}]
    assert tried[1] == [{"a": 2, "b": 1, "c": 0}, {"a": 2, "b": 3, "c": 0}]


def test_a_variant_is_trained_by_its_own_module() -> None:
    run = Run("lpl", 1, True, 10, {"use_lpl": True})
    assert run.command == "lpl"
    assert replace(run, options={"variant_captions": "captioned"}).command == "benchmarks.quality.variants"


# The data.


def picture(name: str, *words: str, kind: str = "photo", folder: str = "") -> pictures.Picture:
    return pictures.Picture(
        name, kind, words, folder, Image.effect_noise((300, 300), 60).convert("RGB"), kind != "photo"
    )


def test_views_are_split_by_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [picture(f"stamps/{i}.png", "thing", kind="photo" if i % 2 else "emoji") for i in range(40)]
    found += [picture(f"demo/{i}", "thing") for i in range(5)]
    monkeypatch.setattr(fetch, "selected", lambda root: found)
    names = {}
    for place in ("a", "b"):
        fetch.fetch(tmp_path / place, tmp_path)
        for part in ("train", "same", "held-out"):
            lines = (tmp_path / place / "data" / part / "metadata.jsonl").read_text().splitlines()
            names[place, part] = {json.loads(line)["picture"] for line in lines}
            views = [p.read_bytes() for p in sorted((tmp_path / place / "data" / part).glob("*.png"))]
            assert len(views) == len(lines)
            names[place, part, "bytes"] = views
    assert names["a", "train"] == names["a", "same"]
    assert not names["a", "train"] & names["a", "held-out"]
    assert names["a", "train"] | names["a", "held-out"] == {p.name for p in found}
    assert 4 <= len(names["a", "held-out"]) <= 20
    assert not any(name.startswith("demo/") for name in names["a", "held-out"])
    assert not set(names["a", "train", "bytes"]) & set(names["a", "same", "bytes"])
    for part in ("train", "same", "held-out"):
        assert names["a", part, "bytes"] == names["b", part, "bytes"]


def test_a_picture_and_its_double_are_not_on_both_sides() -> None:
    first, other = picture("stamps/a.png"), picture("stamps/c.png")
    mirrored = replace(first, name="stamps/b.png", image=first.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    flat = replace(other, image=Image.new("RGB", (300, 300), "red"))
    assert [p.name for p in pictures.without_doubles([first, mirrored, flat])] == ["stamps/a.png", "stamps/c.png"]


def test_captions_have_words_of_training_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures.Picture, "held_out", property(lambda p: p.name.startswith("held")))
    found = [picture("a", "red", "apple"), picture("b", "red", "fox"), picture("held/c", "red", "yak"),
             picture("held/d", "yak")]  # fmt: skip
    known = pictures.vocabulary(found)
    assert known == {"red"}
    assert pictures.caption(found[2], known) == "photo of red"
    assert pictures.caption(found[3], known, 0.4) == "close-up photo"


# What is measured.


def test_search_goes_on_along_the_grid_until_the_best_is_inside() -> None:
    request = Request(10, 1, [(2.0, 20), (3.0, 20), (2.0, 4), (3.0, 4)], [1.0, 1.5, 2.0, 3.0, 5.0, 7.0])
    distance = {1.0: 9.0, 1.5: 8.0, 2.0: 5.0, 3.0: 3.0, 5.0: 4.0, 7.0: 6.0}
    rows: list[dict] = []
    while points := next_points(request, rows):
        guidance, steps = points[0]
        rows.append(
            {"guidance": guidance, "sampling_steps": steps, "frechet": distance[guidance if steps == 20 else 1.0]}
        )
    made = [(row["guidance"], row["sampling_steps"]) for row in rows]
    assert made[:4] == request.points
    assert {g for g, steps in made if steps == 20} == {2.0, 3.0, 5.0}
    assert len(made) == len(set(made))
    assert next_points(replace(request, grid=[]), rows[:3]) == [(3.0, 4)]


def features_of(count: int, seed: int, shift: float = 0.0) -> PictureSet:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(count, d, generator=generator) + shift for d in (6, 3))
    return PictureSet(first, second, torch.rand(count, 32, generator=generator).double() + 1)


def test_figures_are_those_of_the_evaluation() -> None:
    from lpl.evaluation.metrics import Moments, frechet_distance, log_error, precision_recall

    samples, held_out, same = features_of(30, 1), features_of(50, 2, 0.5), features_of(40, 3)
    found = measure.figures(samples, measure.Target(held_out), measure.Target(same))
    assert tuple(found) == measure.FIGURES
    pairs = {"frechet": (samples.features, held_out.features), "frechet_same": (samples.features, same.features),
             "frechet_second": (samples.second, held_out.second)}  # fmt: skip
    for name, (x, y) in pairs.items():
        assert found[name] == pytest.approx(float(frechet_distance(Moments(x), Moments(y))))
    shares = precision_recall(samples.features, held_out.features[:30])
    assert (found["precision"], found["recall"]) == (shares[0].value, shares[1].value)
    wanted = float(log_error(samples.power.mean(0), held_out.power.mean(0), "high"))
    assert found["high_band_log_error"] == pytest.approx(wanted)


@pytest.fixture
def toy_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """measure_run without a model: what is drawn is listed, and the third drawing is interrupted once."""
    drawn: list[tuple[float, int]] = []

    class Judge:
        data = tmp_path / "data"

        def __init__(self, *_: object) -> None: ...

        def key(self) -> str:
            return (tmp_path / "key").read_text()

        def real(self, name: str) -> PictureSet:
            return features_of(30, 1)

        def look_at(self, images: object) -> PictureSet:
            return features_of(20, 2)

    def draw(_: object, captions: list[str], samples: int, seed: int, guidance: float, steps: int) -> torch.Tensor:
        assert (sorted(captions), samples, seed) == (["a", "b"], 20, 7)
        drawn.append((guidance, steps))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return torch.zeros(20, 3, 2, 2, dtype=torch.uint8)

    (tmp_path / "data" / "held-out").mkdir(parents=True)
    rows = [json.dumps({"file_name": f"{text}.png", "text": text, "picture": text}) for text in "ab"]
    (tmp_path / "data" / "held-out" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "key").write_text("one")
    monkeypatch.setattr(measure, "Judge", Judge)
    monkeypatch.setattr(measure, "draw", draw)
    monkeypatch.setattr(measure, "open_sampler", lambda run: type("Sampler", (), {"vae": None}))
    return drawn


def test_a_killed_measurement_loses_one_point(tmp_path: Path, toy_measuring: list[tuple[float, int]]) -> None:
    request = Request(20, 7, [(1.0, 20), (2.0, 20), (3.0, 20), (3.0, 4)])
    with pytest.raises(KeyboardInterrupt):
        measure.measure_run(tmp_path, tmp_path, tmp_path, request)
    rows = measure.measure_run(tmp_path, tmp_path, tmp_path, request)
    assert toy_measuring == [(1.0, 20), (2.0, 20), (3.0, 20), (3.0, 20), (3.0, 4)]
    assert [(row["guidance"], row["sampling_steps"]) for row in rows] == request.points
    (tmp_path / "key").write_text("two")
    with pytest.raises(UserError, match="was measured with other data, features or VAE"):
        measure.measure_run(tmp_path, tmp_path, tmp_path, request)


def test_few_steps_begin_at_the_noisy_end() -> None:
    from lpl.demo.architecture import build_pipeline

    sampler = measure.open_sampler_of(build_pipeline())
    sampler.pipeline.scheduler.set_timesteps(4)
    assert sampler.pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert float(sampler.pipeline.scheduler.sigmas[-1]) == 0


def test_second_feature_space_is_kept_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = features.Network(5).eval()
    features.save_features(network, tmp_path / features.FILE)
    again = features.FeatureNetwork(tmp_path / features.FILE)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        wanted = network(images.float() / 127.5 - 1)
    torch.testing.assert_close(again(images), wanted, rtol=0.01, atol=0.01)
    other = features.Network(5)
    features.save_features(other, tmp_path / "other.safetensors")
    assert features.FeatureNetwork(tmp_path / "other.safetensors").key != again.key


def test_contrast_is_cross_entropy_over_the_other_views() -> None:
    """Two pairs at right angles: of the three others one has similarity 1, two have 0."""
    z = torch.eye(2)
    t = features.TEMPERATURE
    wanted = -math.log(math.exp(1 / t) / (math.exp(1 / t) + 2))
    assert float(features.contrast(3 * z, z)) == pytest.approx(wanted, rel=1e-5)


# What is kept.


def test_kept_weights_make_the_pipeline_again(tmp_path: Path) -> None:
    from lpl.demo.photographs import all_captions
    from lpl.demo.weights import load_pipeline

    pipeline, weights = load_pipeline(), tmp_path / "weights"
    pipeline.save_pretrained(tmp_path / "base")
    kept.keep_vae(pipeline.vae, weights)
    kept.keep_pipeline(tmp_path / "base", weights, tuple(all_captions()), 7)
    again = kept.kept_pipeline(weights)
    for part in ("vae", "unet", "text_encoder", "text_encoder_2"):
        pairs = zip(
            getattr(again, part).state_dict().values(), getattr(pipeline, part).state_dict().values(), strict=True
        )
        assert all(torch.equal(x, y.half().float()) for x, y in pairs)
    assert kept.read_kept(weights)["steps"] == 7
    assert again.tokenizer("a rose").input_ids == pipeline.tokenizer("a rose").input_ids
    with pytest.raises(UserError, match="the UNet of this arm is not kept"):
        kept.kept_pipeline(weights, "lpl")
    with torch.no_grad():
        for number, parameter in enumerate(pipeline.unet.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter += 1e-2 * parameter.abs().mean() * noise
    pipeline.save_pretrained(tmp_path / "run")
    kept.keep_arm(tmp_path / "run", tmp_path / "base", "lpl", weights)
    arm = kept.kept_pipeline(weights, "lpl").unet.state_dict()
    for name, wanted in pipeline.unet.state_dict().items():
        change = (wanted - again.unet.state_dict()[name]).abs().max()
        assert (arm[name] - wanted).abs().max() <= 0.02 * change + 1e-3 * wanted.abs().max()


def test_pretraining_goes_on_from_kept_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.quality import pretrain
    from lpl.demo.weights import load_pipeline
    from tools.demo_weights.base import BaseModel
    from tools.demo_weights.training_run import TrainingRun

    captions = ("a red apple",)
    model = BaseModel(captions, (80, 96))
    pipeline = load_pipeline()
    pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2 = model.unet, model.text_encoder, model.text_encoder_2
    monkeypatch.setattr(pretrain, "read_kept", lambda folder: {"steps": 40})
    monkeypatch.setattr(pretrain, "kept_pipeline", lambda folder: pipeline)
    run = TrainingRun(BaseModel(captions, (80, 96)), tmp_path / "none.pt", 50, 1e-3)
    pretrain.go_on_from_kept(run, tmp_path)
    assert run.step == 40
    for trained in (run.module, run.average):
        pairs = zip(trained.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    shorter = TrainingRun(BaseModel(captions, (80, 96)), tmp_path / "none.pt", 30, 1e-3)
    pretrain.go_on_from_kept(shorter, tmp_path)
    assert shorter.step == 0


def test_a_longer_pretraining_is_not_taken_for_a_shorter_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = replace(read_arms(), pretraining=arms.Pretraining(steps=60, every=20, seed=100))
    stages, made = Stages(benchmark, tmp_path, Results(tmp_path / "results.json"), Workers()), []
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").touch()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"step": 33}, tmp_path / "checkpoints" / "denoiser.pt")

    def train(steps: int, pipeline: Path) -> None:
        made.append(("train", steps))
        pipeline.mkdir(parents=True)
        torch.save({"step": steps}, tmp_path / "checkpoints" / "denoiser.pt")

    monkeypatch.setattr(stages, "features", lambda: made.append(("features", 0)))
    monkeypatch.setattr(stages, "_train_denoiser", train)
    monkeypatch.setattr(stages, "_measure_pretrained", lambda run, pipeline: made.append(("measure", run.steps)))
    stages.workers.number = 1
    stages.denoiser()
    assert made == [("features", 0), ("train", 40), ("train", 60), ("measure", 40), ("measure", 60)]


# Rows.


def point(guidance: float, frechet: float, steps: int = 20, **more: object) -> dict:
    return {"guidance": guidance, "sampling_steps": steps, "frechet": frechet, "recall": 0.5, "precision": 0.5,
            "high_band_log_error": frechet, "frechet_second": frechet, "frechet_same": frechet} | more  # fmt: skip


def test_results_know_a_point_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    made = Run("lpl", 1, True, 10, {"use_lpl": True})
    results.add(made, 64, [point(2.0, 5.0)], 7.0)
    results.add(made, 64, [point(2.0, 5.0), point(3.0, 4.0)], 7.0)
    again = Results(tmp_path / "results.json")
    assert [(row["guidance"], row["frechet"]) for row in again.find(made, 64)] == [(2.0, 5.0), (3.0, 4.0)]
    assert {"commit", "seconds", "samples", "options", "arm", "seed", "steps"} <= again.rows[0].keys()
    assert again.find(made, 65) == []
    for other in (replace(made, options={"use_lpl": True, "lpl_scale": False}), replace(made, seed=2),
                  replace(made, reported=False), replace(made, steps=11)):  # fmt: skip
        assert again.find(other, 64) == []


def test_rows_made_with_something_else_in_common_are_not_taken_up(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Results(file).fix("common", {"train_batch_size": 16})
    Results(file).fix("common", {"train_batch_size": 16})
    with pytest.raises(UserError, match=r"its rows were made with common .'train_batch_size': 16., not"):
        Results(file).fix("common", {"train_batch_size": 32})
    file.write_text("[]")
    with pytest.raises(UserError, match=r"is no results\.json"):
        Results(file)
    with pytest.raises(UserError, match=r"is no results\.json"):
        Results(Path(summary.__file__).parent / "results_2026-11.json")


def test_equal_cost_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    benchmark = read_arms()
    stages = Stages(benchmark, tmp_path, Results(tmp_path / "results.json"), Workers())
    monkeypatch.setattr(stages, "_base", lambda: model)
    options = merged(benchmark.common, benchmark.baseline.start)
    plain, budget, whole = (
        step_cost(merged(options, benchmark.controls[arm].plus), model)
        for arm in ("baseline-same-cost", "lpl-budget", "lpl-default")
    )
    assert budget == pytest.approx(1.15 * plain)
    for arm, cost in (("baseline-same-cost", plain), ("lpl-default-same-cost", whole)):
        run = stages._control(arm, benchmark.controls[arm], 1, options)
        assert run.base_steps == benchmark.steps
        assert run.steps * cost == pytest.approx(benchmark.steps * budget, rel=2e-3)
    with pytest.raises(UserError, match="the FLOPs of variant_captions are not counted"):
        step_cost({"variant_captions": "uncaptioned"}, model)


def test_a_run_that_diverged_is_noted_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = read_arms()
    stages, tried = Stages(benchmark, tmp_path, Results(tmp_path / "results.json"), Workers()), []

    def complete(run: Run, _: object) -> list[dict]:
        tried.append(run.options["a"])
        if run.options["a"] == 2:
            raise DivergedError("not finite")
        return [point(2.0, 5.0 - run.options["a"]), point(3.0, 9.0), point(2.0, 0.1, steps=4)]

    monkeypatch.setattr(stages, "_complete", complete)
    points = benchmark.points["search"]
    for _ in range(2):
        scores = [stages._score(Run("lpl", 101, False, 5, {"a": a}), points) for a in (1, 2)]
        assert scores == [4.0, math.inf]
    assert tried == [1, 2, 1]


def test_arms_begin_with_the_kept_weights_only(tmp_path: Path) -> None:
    stages = Stages(read_arms(), tmp_path, Results(tmp_path / "results.json"), Workers())
    with pytest.raises(UserError, match="has no denoiser, not one of 12000: run --stage denoiser first"):
        stages._base()
    stages.weights.mkdir()
    (stages.weights / kept.PIPELINE).write_text(json.dumps({"steps": 6000}))
    with pytest.raises(UserError, match="has a denoiser of 6000 steps, not one of 12000"):
        stages._base()


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


def test_workers_end_and_pause_what_runs(tmp_path: Path) -> None:
    (tmp_path / "pause").touch()
    workers = Workers(budget_minutes=2.5 / 60, pause=tmp_path / "pause")
    with pytest.raises(BudgetSpentError):
        workers.call(["http.server", "--bind", "127.0.0.1", "0"], tmp_path / "log.txt")


# What is made of the rows.


def rows_of(arm: str, curves: dict[int, dict[float, float]], steps: int = 20, **more: object) -> list[dict]:
    given = {"arm": arm, "reported": True, "steps": 5, "samples": 10} | more
    return [point(g, value, steps) | {"seed": seed} | given for seed, of in curves.items() for g, value in of.items()]


def test_guidance_is_chosen_on_the_other_seeds() -> None:
    """Seed 3 alone likes guidance 1: it is measured where the other two are best; they choose with it."""
    rows = rows_of("lpl", {1: {1.0: 5, 2.0: 3, 3.0: 4}, 2: {1.0: 5, 2.0: 3, 3.0: 4}, 3: {1.0: 1, 2.0: 9, 3.0: 4}})
    found = summary.at_best(rows, "lpl", 20)
    assert {seed: row["guidance"] for seed, row in found.items()} == {1: 1.0, 2: 1.0, 3: 2.0}
    assert [row["frechet"] for row in found.values()] == [5, 5, 9]
    assert summary.is_at_edge(rows, "lpl", 20)
    inside = rows_of("lpl", {s: {1.0: 5, 2.0: 3, 3.0: 4} for s in (1, 2)})
    assert not summary.is_at_edge(inside, "lpl", 20)
    missing = [row for row in inside if (row["seed"], row["guidance"]) != (2, 2.0)]
    assert {row["guidance"] for row in summary.at_best(missing, "lpl", 20).values()} == {3.0}
    assert summary.at_best([], "lpl", 20) == {}


def test_every_arm_of_lpl_is_shown_scale_by_scale() -> None:
    curves, more = {1: {1.0: 5, 2.0: 3, 3.0: 4}}, dict.fromkeys(summary.FIGURES, 1.0)
    rows = [more | row for arm in ("baseline", "lpl", "lpl-default") for row in rows_of(arm, curves)]
    heads = [text.splitlines()[0] for text in summary.points_tables(rows, "")]
    for arm in ("lpl", "lpl-default"):
        assert sum(f"| frechet {arm} / baseline |" in head for head in heads) == 1


def test_a_seed_that_is_not_measured_to_its_best_chooses_nothing() -> None:
    whole = {1.0: 5, 2.0: 4, 3.0: 3, 5.0: 4}
    for part in ({2.0: 4}, {1.0: 5, 2.0: 4}, {3.0: 4, 5.0: 5}, {1.0: 5, 3.0: 4}):
        rows = rows_of("lpl", {1: whole, 2: part})
        assert {seed: row["guidance"] for seed, row in summary.at_best(rows, "lpl", 20).items()} == {1: 3.0}
        assert not summary.is_at_edge(rows, "lpl", 20)
    rows = rows_of("lpl", {1: whole, 2: {2.0: 4, 3.0: 3, 5.0: 4}})
    assert {seed: row["guidance"] for seed, row in summary.at_best(rows, "lpl", 20).items()} == {1: 3.0, 2: 3.0}


def test_only_runs_of_one_length_and_number_of_samples_are_paired() -> None:
    curve = {1: {1.0: 3.0, 2.0: 1.0, 3.0: 2.0}, 2: {1.0: 3.0, 2.0: 1.0, 3.0: 2.0}}
    ours = {seed: {g: 0.9 * v for g, v in of.items()} for seed, of in curve.items()}
    rows = rows_of("baseline", curve) + rows_of("lpl", ours)
    assert summary.ratio_of(rows, "lpl", "baseline", 20).value == pytest.approx(0.9)
    wall = rows_of("wall", curve, base_steps=5) and [r | {"steps": 15} for r in rows_of("wall", curve, base_steps=5)]
    assert summary.ratio_of(rows + wall, "lpl", "wall", 20).seeds == 2
    longer = rows + [row | {"steps": 10} for row in rows_of("lpl", ours)]
    assert summary.ratio_of(longer, "lpl", "baseline", 20) is None
    assert summary.ratio_of(rows + rows_of("lpl", ours, samples=20), "lpl", "baseline", 20) is None


def content(ours: float, few: float, edge: bool = False, recall: float = 0.5) -> dict:
    curve = {1.0: 3.0, 2.0: 1.0, 3.0: 2.0}
    base = {seed: dict(curve) for seed in range(5)}
    rows = []
    for steps, ratio in ((20, ours), (4, few)):
        seeds = {s: {g: v * (ratio + 0.001 * s) for g, v in curve.items() if not edge or g > 1} for s in base}
        rows += rows_of("baseline", base, steps)
        rows += [row | {"recall": recall} for row in rows_of("lpl", seeds, steps)]
    pretrained = rows_of("pretrained", {100: {2.0: 1.5}}, steps=20) + rows_of(
        "pretrained", {100: {2.0: 1.48}}, steps=20
    )
    for row, steps in zip(pretrained, (80, 100), strict=True):
        row |= {"steps": steps, "reported": False}
    return {"rows": rows + pretrained, "floors": [{"samples": 10, "frechet": 0.4}]}


def test_verdict_holds_every_bar() -> None:
    def met(found: dict) -> list[str]:
        return [line.split("|")[-2].strip() for line in summary.verdict(found).splitlines()[2:]]

    assert met(content(0.9, 0.85)) == ["yes"] * 6 + ["-", "yes", "yes"]
    assert met(content(0.96, 0.85))[:1] == ["no"]
    assert met(content(0.9, 0.91))[3:4] == ["no"]
    assert met(content(0.9, 0.85, edge=True))[0] == "no"
    assert met(content(0.9, 0.85, recall=0.48))[1] == "no"
    assert met(content(1.01, 1.01))[2] == "no"
    assert summary.headroom(content(0.9, 0.85)) == pytest.approx(2.5)
    assert summary.convergence(content(0.9, 0.85)["rows"]) == pytest.approx(1 - 1.48 / 1.5)
    assert summary.verdict({"rows": [], "floors": []}).count("not yet") == 9


def test_summary_names_the_search_by_what_differs() -> None:
    rows = [
        point(g, value + g, steps)
        | {"arm": "lpl", "seed": 101, "reported": False, "steps": 5, "samples": 9, "options": o}
        for value, o in ((5.0, {"a": 1}), (3.0, {"a": 2, "b": True, "lpl_norm_type": "batch"}))
        for g in (1.0, 2.0)
        for steps in (20, 4)
    ]
    found = summary.tried(rows, "lpl", None)
    assert [entry.said for entry in found] == ["chosen", "a 1, b unset, lpl_norm_type own"]
    assert [(entry.many["frechet"], entry.few["frechet"]) for entry in found] == [(4.0, 4.0), (6.0, 6.0)]
    assert [entry.said for entry in summary.tried(rows, "lpl", {"a": 1})][1] == "chosen"
    assert "lpl, 2 runs" in summary.summary({"rows": rows, "floors": []})


# Controls.


@pytest.mark.parametrize("kind", ["squared", "channel"])
def test_control_is_the_formula(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    pred, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    out = LatentDistance(kind)(pred, y)
    normed = [plain, y]
    if kind == "channel":
        mean, std = plain.mean((2, 3), keepdim=True), plain.std((2, 3), keepdim=True) + 1e-6
        normed = [(plain - mean) / std, (y - mean) / std]
    wanted = (normed[0] - normed[1]).square().mean((1, 2, 3))
    torch.testing.assert_close(out.per_sample, wanted)
    (weights * out.per_sample).sum().backward()
    (weights * wanted).sum().backward()
    torch.testing.assert_close(pred.grad, plain.grad)
    assert torch.equal(out.per_layer["latent"], out.per_sample.detach())
    assert LatentDistance(kind)(x, y).gradient is None


def test_control_refuses_what_it_does_not_take() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="no mask"):
        LatentDistance()(x, x, torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="one shape"):
        LatentDistance()(x, x[:, :2])
    with pytest.raises(ValueError, match="not 'cosine'"):
        LatentDistance("cosine")
