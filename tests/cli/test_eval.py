"""`lpl eval` through the command line, on the tiny model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from PIL import Image
from tiny_models import tiny_images, tiny_sd
from tiny_networks import tiny_clip, tiny_dinov2

THERE: dict[str, Any] = dict.fromkeys(("num_inference_steps", "guidance_scale", "sample_batch_size"))
"""Takes back what acts with drawn samples alone."""
NO_MODEL: dict[str, Any] = {"pretrained_model_name_or_path": None}

METRICS = {
    "frechet_efficientnet-lite0",
    "kernel_efficientnet-lite0",
    "precision",
    "recall",
    "density",
    "coverage",
    "spectrum_log_error_low",
    "spectrum_log_error_middle",
    "spectrum_log_error_high",
}


@pytest.fixture(scope="module")
def reference(shared: Path) -> Path:
    return Path(tiny_images(shared / "eval-reference", count=52, size=16, seed=3))


@pytest.fixture(scope="module")
def options(model: Path, reference: Path, shared: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": model,
        "reference_dir": reference,
        "reference_cache_dir": shared / "eval-cache",
        "num_samples": 50,
        "resolution": 16,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "sample_batch_size": 16,
        "num_bootstrap": 100,
    }


@pytest.fixture(scope="module")
def evaluate(run_cli: Any, as_flags: Any, options: dict[str, Any]) -> Any:
    """Runs `lpl eval` with the options, changed by keywords; returns eval.json and what was printed, or the errors."""

    def run(folder: Path, *argv: str, fails: bool = False, **changed: Any) -> Any:
        code, out, err = run_cli(["eval", *as_flags({"output_dir": folder, **options, **changed}), *argv])
        if fails:
            assert code == 2, err
            return "\n".join(line for line in err.splitlines() if line.startswith("error: "))
        assert code == 0, err
        return json.loads((folder / "eval.json").read_text()), out

    return run


def images(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def whole(evaluate: Any, shared: Path) -> Any:
    folder = shared / "eval-whole"
    return folder, *evaluate(folder)


def test_result_and_table(whole: Any, model: Path, reference: Path, options: dict[str, Any]) -> None:
    folder, result, out = whole
    assert {"lpl", "kind", "environment", "options", "refused", "model", "reference", "num_samples"} <= result.keys()
    assert (result["kind"], result["features"]) == ("eval", "efficientnet-lite0")
    assert (result["model"], result["reference"]) == (str(model), str(reference))
    assert (result["num_samples"], result["num_reference"]) == (50, 52)
    files = hashlib.blake2b(digest_size=16)
    for file in sorted(reference.glob("*.png")):
        files.update(hashlib.blake2b(file.read_bytes(), digest_size=16).digest())
    assert result["reference_digest"] == files.hexdigest()
    assert result["prompts_digest"] == json.loads((folder / "samples.json").read_text())["prompts"]
    assert set(result["metrics"]) == METRICS
    for name, metric in result["metrics"].items():
        assert set(metric) == {"value", "interval", "floor", "lower_is_better", "note"}
        low, high = metric["interval"]
        assert low <= metric["value"] <= high
        assert isinstance(metric["floor"], float)
        assert name in out
    assert "biased: fewer images (50) than features (1280)" in result["metrics"]["frechet_efficientnet-lite0"]["note"]
    assert [line.split(":")[0] for line in result["refused"]] == ["fid, kid", "fd_dinov2", "clip_score"]
    assert out.splitlines()[0] == f"50 samples of {model} against 52 images of {reference}"
    spectrum = result["spectrum"]
    assert {key: len(values) for key, values in spectrum.items()} == dict.fromkeys(
        ("frequency", "samples", "reference", "floor"), 8
    )
    high = [abs(math.log(a / b)) for a, b in zip(spectrum["samples"], spectrum["reference"], strict=True)][4:]
    assert result["metrics"]["spectrum_log_error_high"]["value"] == pytest.approx(sum(high) / 4, rel=1e-6)
    captions = [json.loads(line)["text"] for line in (reference / "metadata.jsonl").read_text().splitlines()]
    by_name = sorted(range(52), key=lambda i: f"{i}.png")
    assert [entry["prompt"] for entry in result["images"]] == [captions[i] for i in by_name[:50]]
    assert result["images"][7] == {
        "prompt": captions[by_name[7]], "seed": 0, "index": 7, "file": "images/00000/00000007.png",
    }  # fmt: skip
    for entry in result["images"]:
        with Image.open(folder / entry["file"]) as image:
            assert image.size == (16, 16)


def test_nothing_is_drawn_twice_and_torn_runs_go_on(evaluate: Any, whole: Any, tmp_path: Path) -> None:
    folder, result, _ = whole
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    times = {p: p.stat().st_mtime_ns for p in copy.rglob("*.png")}
    assert evaluate(copy)[0]["metrics"] == result["metrics"]
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*.png")} == times
    for index in (3, 40, 41):
        (copy / f"images/00000/{index:08}.png").unlink()
    assert evaluate(copy)[0] == result | {"options": {**result["options"], "output_dir": str(copy)}}
    assert images(copy) == images(folder)


SINGLE = {
    "lpl", "kind", "environment", "options", "refused", "model", "reference", "num_samples", "num_reference",
    "reference_digest", "prompts_digest", "resolution", "guidance_scale", "features", "metrics", "spectrum",
    "image_root", "images",
}  # fmt: skip


def test_points_share_noise_model_and_reference_and_go_on(
    evaluate: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair is drawn from the noise that a point by itself has; what is finished is not made again."""
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as pipeline_module

    from lpl.evaluation import measuring
    from lpl.families import sampling

    folder, single, _ = whole
    assert single.keys() == SINGLE
    assert (single["options"]["guidance_scale"], single["options"]["num_inference_steps"]) == (1.0, 2)
    assert {path.name for path in folder.iterdir()} == {".lpl.json", "images", "samples.json", "eval.json"}
    latents: list[torch.Tensor] = []
    loaded: list[str] = []
    measured: list[Path] = []
    draw, load, measure = pipeline_module.randn_tensor, sampling.load_for_sampling, measuring.measure_all

    def randn_tensor(*args: Any, **options: Any) -> torch.Tensor:
        latents.append(draw(*args, **options))
        return latents[-1].clone()

    monkeypatch.setattr(pipeline_module, "randn_tensor", randn_tensor)
    monkeypatch.setattr(sampling, "load_for_sampling", lambda *a: loaded.append("model") or load(*a))
    monkeypatch.setattr(measuring, "measure_all", lambda *a: measured.append(a[0].folder) or measure(*a))
    points = ["--guidance_scale", "1", "3", "--num_inference_steps", "2", "5"]
    several = {"guidance_scale": None, "num_inference_steps": None}
    found, out = evaluate(tmp_path, *points, **several)
    assert loaded == ["model"]
    by_point = [torch.cat(list(part)) for part in zip(*[iter(latents)] * 4, strict=True)]  # 50 samples, 16 together
    assert len(by_point) == 4
    assert by_point[0].shape[0] == 50
    assert all(torch.equal(by_point[0], other) for other in by_point[1:])
    names = ["guidance-1-steps-2", "guidance-3-steps-2", "guidance-1-steps-5", "guidance-3-steps-5"]
    assert [point["folder"] for point in found["points"]] == [f"points/{name}" for name in names]
    assert images(tmp_path / "points" / names[0]) == images(folder)
    assert (found["points"][0]["metrics"], found["points"][0]["spectrum"]) == (single["metrics"], single["spectrum"])
    firsts = {(tmp_path / "points" / name / "images/00000/00000000.png").read_bytes() for name in names}
    assert len(firsts) == 4
    table = [line.split()[:2] for line in out.splitlines()[4:8]]
    assert table == [["2", "1"], ["2", "3"], ["5", "1"], ["5", "3"]]
    distance = {(p["num_inference_steps"], p["guidance_scale"]): p["metrics"]["frechet_efficientnet-lite0"]["value"]
                for p in found["points"]}  # fmt: skip
    for entry in found["best"]:
        steps, best = entry["num_inference_steps"], entry["guidance_scale"]
        assert distance[steps, best] == entry["value"] == min(distance[steps, 1.0], distance[steps, 3.0])
        told = f"{steps} steps: best guidance 3 is the end of the list: add a higher one"
        assert (told in out) == (best == 3) == (entry["edge"] == "end")
    assert found["images"][0]["file"].startswith(f"points/guidance-{found['guidance_scale']:g}-steps-5/images/")
    # A killed command: one point lacks a sample and its figures, another its figures alone.
    assert measured.pop(0) == tmp_path / "points" / names[0]
    measured.clear()
    latents.clear()
    (tmp_path / "points" / names[1] / "images/00000/00000049.png").unlink()
    for name in names[1:3]:
        (tmp_path / "points" / name / "figures.json").unlink()
    (tmp_path / "eval.json").unlink()
    again, _ = evaluate(tmp_path, *points, **several)
    assert again == found
    assert [len(batch) for batch in latents] == [2]
    assert measured == [tmp_path / "points" / name for name in names[1:3]]
    measured.clear()
    longer, _ = evaluate(tmp_path, *points[:3], "4", *points[3:5], **several)
    assert measured == [tmp_path / "points" / "guidance-4-steps-2"]
    assert [p["guidance_scale"] for p in longer["points"]] == [1.0, 3.0, 4.0]
    fewer, _ = evaluate(tmp_path, *points[:4], "2", **several, num_bootstrap=0)
    assert [len(measured), fewer["points"][0]["metrics"]["recall"]["interval"]] == [3, None]


def test_a_reference_that_cannot_be_read_is_found_before_drawing(
    evaluate: Any, reference: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(reference, tmp_path / "copy"))
    (copy / "7.png").write_bytes((copy / "7.png").read_bytes()[:60])
    line = evaluate(tmp_path / "out", reference_dir=copy, fails=True)
    assert line.startswith(f"error: --reference_dir: {copy / '7.png'}: ")
    assert not (tmp_path / "out" / "images").exists()


def test_a_drawn_sample_that_is_damaged_is_named_by_its_folder(evaluate: Any, whole: Any, tmp_path: Path) -> None:
    folder, result, _ = whole
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "images/00000/00000003.png").write_bytes(b"x")
    line = evaluate(copy, fails=True)
    assert line.startswith(f"error: --output_dir {copy}: {copy / 'images/00000/00000003.png'}: ")
    assert line.endswith("; repair or remove it")
    (copy / "images/00000/00000003.png").unlink()
    assert evaluate(copy)[0]["metrics"] == result["metrics"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_killed_run_ends_as_a_whole_one(whole: Any, evaluate: Any, tmp_path: Path) -> None:
    from lpl.families.sampling import FamilySampler

    folder, result, _ = whole
    torch.set_num_threads(1)  # threads do not survive a fork
    child = os.fork()
    if not child:  # slow batches, so that the kill falls between two of them
        draw = FamilySampler.__call__
        FamilySampler.__call__ = lambda *given: (time.sleep(0.5), draw(*given))[1]  # type: ignore[method-assign]
        with contextlib.suppress(BaseException):
            evaluate(tmp_path)
        os._exit(1)
    limit = time.monotonic() + 120
    while len(images(tmp_path)) < 10 and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert 10 <= len(images(tmp_path)) < 50
    assert evaluate(tmp_path)[0]["metrics"] == result["metrics"]
    assert images(tmp_path) == images(folder)


def test_two_processes_draw_the_same(as_flags: Any, options: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    launching.launch(["eval", *as_flags({**options, "output_dir": tmp_path})], 2)
    assert images(tmp_path) == images(whole[0])
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"] == whole[1]["metrics"]


def test_images_that_are_there(evaluate: Any, whole: Any, model: Path, tmp_path: Path) -> None:
    folder, result, _ = whole
    there = {**THERE, "images": folder / "images", "num_samples": None, "resolution": None}
    found, _ = evaluate(tmp_path, pretrained_model_name_or_path=model, **there)
    assert found["metrics"] == result["metrics"]
    assert found["model"] == str(folder / "images")
    assert (found["reference_digest"], found["prompts_digest"]) == (result["reference_digest"], None)
    assert [e["prompt"] for e in found["images"]] == [e["prompt"] for e in result["images"]]
    assert (found["image_root"], found["images"][1]["file"]) == (str(folder / "images"), "00000/00000001.png")
    bare, out = evaluate(tmp_path / "bare", pretrained_model_name_or_path=None, **there)
    assert {m["floor"] for m in bare["metrics"].values()} == {None}
    assert any(line.startswith("floor: no VAE") for line in bare["refused"])
    assert "skipped: floor: no VAE" in out
    there |= {"pretrained_model_name_or_path": None, "pretrained_vae_model_name_or_path": model / "vae"}
    own, _ = evaluate(tmp_path / "vae", **there)
    assert own["metrics"] == result["metrics"]


def test_against_reconstructions(evaluate: Any, whole: Any, tmp_path: Path) -> None:
    there = {**THERE, "images": whole[0] / "images", "against": "reconstructions", "metrics": "spectrum"}
    found, out = evaluate(tmp_path, **there)
    assert found["spectrum"]["reference"] == whole[1]["spectrum"]["floor"]
    assert "half : half" in out
    assert not any("enlarged" in line for line in found["refused"])
    assert found["metrics"]["spectrum_log_error_high"]["floor"] > 0
    bare, _ = evaluate(tmp_path, **there, floor=False)
    assert {m["floor"] for m in bare["metrics"].values()} == {bare["spectrum"]["floor"]} == {None}
    assert bare["metrics"]["spectrum_log_error_high"]["value"] == found["metrics"]["spectrum_log_error_high"]["value"]
    large, _ = evaluate(tmp_path, **there, resolution=20)
    assert [line[:51] for line in large["refused"]][:2] == [
        "52 of 52 reference images had to be enlarged to 20 "[:51],
        "50 of 50 samples had to be enlarged to 20 pixels: this adds blur"[:51],
    ]
    assert set(found["metrics"]) == {name for name in METRICS if name.startswith("spectrum")}


def test_further_networks(evaluate: Any, whole: Any, model: Path, tmp_path: Path) -> None:
    dino, clip = tiny_dinov2(tmp_path / "dino"), tiny_clip(tmp_path / "clip")
    there = {
        **THERE,
        "images": whole[0] / "images",
        "num_samples": None,
        "metrics": "spectrum",
        "dinov2": dino,
        "clip": clip,
    }
    found, _ = evaluate(tmp_path / "out", **there)
    assert [line.split(":")[0] for line in found["refused"]] == ["fid, kid"]
    assert set(found["metrics"]) == {"fd_dinov2", "clip_score"} | {name for name in METRICS if "spectrum" in name}
    frechet, score = found["metrics"]["fd_dinov2"], found["metrics"]["clip_score"]
    assert frechet["floor"] > 0
    assert frechet["note"] is None  # 50 images, 16 features
    from lpl.evaluation.features import ClipScore
    from lpl.evaluation.images import list_pictures, read_pictures

    files = list_pictures(whole[0] / "images", "--images")
    each = ClipScore(str(clip))(read_pictures(files, 16, "--images"), [entry["prompt"] for entry in found["images"]])
    assert score["value"] == pytest.approx(float(each.mean()), rel=1e-9)
    assert score["interval"][0] < score["value"] < score["interval"][1]
    assert score["floor"] is not None
    (tmp_path / "bare").mkdir()
    shutil.copyfile(files[0], tmp_path / "bare" / "a.png")
    bare, _ = evaluate(tmp_path / "out2", **{**there, "images": tmp_path / "bare"})
    assert any(line.startswith("clip_score: the prompts of --images are not known") for line in bare["refused"])
    assert bare["metrics"]["fd_dinov2"]["value"] is None


def test_lora_prompts_file_seed_and_scheduler_change_the_samples(
    evaluate: Any, train_in: Any, whole: Any, shared: Path, tmp_path: Path, model: Path
) -> None:
    plain = images(whole[0])
    run = train_in(shared / "eval-lora", rank=2, learning_rate=0.3, max_train_steps=3)
    few = {"num_samples": 10, "metrics": "spectrum"}
    (tmp_path / "p.txt").write_text("one prompt\n\nanother\n")
    changes: dict[str, dict[str, Any]] = {
        "lora": {"lora": run.folder},
        "half": {"lora": run.folder, "lora_scale": 0.5},
        "run": {"pretrained_model_name_or_path": run.folder},
        "seed": {"seed": 1},
        "scheduler": {"scheduler": "dpmsolver++"},
        "prompts": {"prompts": tmp_path / "p.txt"},
    }
    found = {name: (evaluate(tmp_path / name, **few, **c)[0], images(tmp_path / name)) for name, c in changes.items()}
    assert found["lora"][1] == found["run"][1]
    kinds = [plain, *(found[name][1] for name in changes if name != "run")]
    firsts = {tuple(kind[f"images/00000/{i:08}.png"] for i in range(10)) for kind in kinds}
    assert len(firsts) == len(kinds)
    assert [e["prompt"] for e in found["prompts"][0]["images"]][:3] == ["one prompt", "another", "one prompt"]
    assert evaluate(tmp_path / "seed", **few, seed=2, fails=True).endswith("(seed 1 -> 2); choose another folder")
    weights = evaluate(tmp_path / "seed", **few, seed=1, lora=run.folder, fails=True)
    assert "weights" in weights
    other = shutil.copytree(model, tmp_path / "model")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    scheduler = evaluate(tmp_path / "seed", **few, seed=1, pretrained_model_name_or_path=other, fails=True)
    assert "drawn otherwise (scheduler's config" in scheduler


def test_a_single_file_gives_the_same_samples(
    run_cli: Any, evaluate: Any, whole: Any, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    assert run_cli(["export", str(model), "--output", str(file)])[0] == 0
    few = {"num_samples": 16, "metrics": "spectrum"}
    evaluate(tmp_path / "out", pretrained_model_name_or_path=file, single_file_config=model, **few)
    found, expected = images(tmp_path / "out"), images(whole[0])
    assert found == {name: expected[name] for name in found}
    assert len(found) == 16


@pytest.mark.parametrize("is_known", [True, False])
def test_a_pipeline_of_another_family(
    evaluate: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Of a family that is known here, and of one that is not, which draws with a guidance of its own."""
    from lpl import families

    if not is_known:
        monkeypatch.setattr("lpl.families.KINDS", families.KINDS[:1])
    from diffusers import StableDiffusionPipeline

    tiny_sd(tmp_path / "sd")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    found, _ = evaluate(
        tmp_path / "out",
        pretrained_model_name_or_path=tmp_path / "sd",
        num_samples=10,
        resolution=None,
        metrics="spectrum",
        **({} if is_known else {"guidance_scale": None}),
    )
    assert found["resolution"] == 16
    assert found["metrics"]["spectrum_log_error_high"]["value"] > 0
    pipeline.set_progress_bar_config(disable=True)
    from lpl.evaluation.generate import generator_of

    expected = pipeline(
        found["images"][0]["prompt"], num_inference_steps=2, guidance_scale=1.0 if is_known else 7.5,
        generator=generator_of(0, 0),
        height=16, width=16, output_type="pt",
    ).images[0]  # fmt: skip
    with Image.open(tmp_path / "out" / found["images"][0]["file"]) as image:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(16, 16, 3).permute(2, 0, 1)
    assert (pixels / 255 - expected).abs().max() < 1.01 / 255


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference_dir": None}, "--reference_dir is missing"),
        ({"reference_dir": "nowhere"}, "--reference_dir nowhere: no such folder"),
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "--pretrained_model_name_or_path ./nowhere: no such folder"),
        ({"prompts": "nowhere.txt"}, "--prompts nowhere.txt: cannot be read (No such file or directory)"),
        ({"images": ".", "prompts": "p.txt"}, "--prompts acts with drawn samples"),
        ({"images": ".", **THERE, "guidance_scale": 2.0}, "--guidance_scale acts with drawn samples"),
        ({"images": ".", **THERE, "floor": False}, "has no use with --no_floor"),
        (
            {"images": ".", **THERE, **NO_MODEL, "variant": "fp16"},
            "--variant acts with --pretrained_model_name_or_path",
        ),
        ({"kernel_subsets": 5, "metrics": "frechet"}, "--kernel_subsets acts on the kernel distance"),
        ({"against": "reconstructions", "images": ".", **THERE, **NO_MODEL}, "needs a VAE"),
        ({"resolution": 20}, "--resolution 20: models draw multiples of 8"),
        ({"num_inference_steps": 0}, "--num_inference_steps must lie in 1..10000, not 0"),
        ({"guidance_scale": -1.0}, "--guidance_scale must be 0 or more, not -1.0"),
        ({"num_samples": 0}, "--num_samples must lie in 1..1000000, not 0"),
        ({"num_samples": 9}, "--num_samples: 9 samples and 52 images in --reference_dir, of which every metric"),
        ({"metrics": "frechet", "num_samples": 49}, "asked for needs at least 50"),
        ({"kernel_subset_size": 20}, "--kernel_subset_size acts with --kernel_subsets"),
        ({"kernel_subsets": 5}, "--kernel_subset_size 1000: there are 50 samples and 52"),
        ({"dtype": "float16"}, "--dtype float16 needs a GPU"),
        ({"lora": "nowhere.safetensors"}, "--lora nowhere.safetensors: no such file"),
        ({"lora_scale": 0.5}, "--lora_scale needs a LoRA"),
        ({"dinov2": "./nowhere"}, "--dinov2 ./nowhere: no config.json there"),
        ({"clip": "./nowhere"}, "--clip ./nowhere: no config.json there"),
        ({"inception_weights": "nowhere"}, "--inception_weights nowhere: no such file"),
        ({"scheduler": "euler"}, "scheduler"),
    ],
)
def test_errors_are_a_line_each(
    evaluate: Any, reference: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    if "images" in changed:
        changed |= {"images": reference, "num_samples": None, "metrics": "spectrum"}
    assert message in evaluate(tmp_path / "out", fails=True, **changed)
    assert not list((tmp_path).rglob("*.png"))


@pytest.mark.parametrize(("resolution", "together"), [(16, 64), (256, 64), (512, 16), (1024, 4), (4096, 1)])
def test_batches_by_resolution(options: dict[str, Any], resolution: int, together: int) -> None:
    from lpl.config.model_commands import EvalConfig
    from lpl.evaluation.planning import check_eval

    found = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if k != "sample_batch_size"}
    found |= {"resolution": resolution, "output_dir": found["reference_cache_dir"]}
    assert check_eval(EvalConfig(**found)).sampling.batch_size == together
