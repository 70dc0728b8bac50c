"""`lpl compare` through the real command line: ordinary runs, the same draws, resumed, measured and told in words."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import launch
from tiny_models import tiny_images

from lpl.base.errors import StopRequestedError, UserError
from lpl.comparison import measures
from lpl.comparison.run import train_all

ARMS = "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\nrepeat: {lpl_weight: 0}\n"
OPTIONS = {"validation_samples": 2, "validation_steps": 2, "max_train_steps": 4}


@pytest.fixture(scope="module")
def flags(base_options: dict[str, Any], as_flags: Any, shared: Path) -> Callable[..., list[str]]:
    """Flags of a small comparison into a folder."""

    def make(folder: Path, arms: str = ARMS, **options: Any) -> list[str]:
        file = shared / f"arms-{abs(hash(arms))}.yaml"
        file.write_text(arms)
        chosen = {k: v for k, v in base_options.items() if k != "lpl_weight"} | OPTIONS | options
        return ["compare", f"--arms={file}", *as_flags(chosen | {"output_dir": folder})]

    return make


@pytest.fixture(scope="module")
def compared(flags: Any, run_cli: Any, shared: Path) -> tuple[Path, str]:
    """A finished comparison and what it printed; not to be changed."""
    folder = shared / "compared"
    code, out, err = run_cli([*flags(folder), "--seeds", "0", "1"])
    assert code == 0, err
    return folder, out


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())  # type: ignore[no-any-return]


def test_an_arm_is_an_ordinary_run(compared: tuple[Path, str], train: Any, read_run: Any) -> None:
    options = OPTIONS | {"lpl_weight": 5.0, "seed": 1}
    alone, arm = train(**options), read_run(compared[0] / "lpl" / "seed-1")
    assert arm.losses() == alone.losses()
    assert all(torch.equal(value, arm.unet()[name]) for name, value in alone.unet().items())


def test_arms_see_the_same_draws(compared: tuple[Path, str], read_run: Any) -> None:
    """Before the first step the weights are equal, so with the same samples and noise the loss is too."""
    losses = [read_run(compared[0] / arm / "seed-0").logged()["diffusion_loss"] for arm in ("baseline", "lpl")]
    other = read_run(compared[0] / "baseline" / "seed-1").logged()["diffusion_loss"]
    assert losses[0][1] == losses[1][1] != other[1]
    assert losses[0][4] != losses[1][4]


def test_compare_json(compared: tuple[Path, str]) -> None:
    found = content(compared[0])
    assert (found["kind"], found["lpl"]) == ("compare", "0.1.0")
    assert found["environment"]["torch"]
    assert [(a["name"], a["baseline"], a["repeats"]) for a in found["arms"]] == [
        ("baseline", True, False), ("lpl", False, False), ("repeat", False, True),
    ]  # fmt: skip
    run = found["arms"][1]["runs"][1]
    assert (run["seed"], run["folder"], run["steps"]) == (1, "lpl/seed-1", 4)
    assert run["seconds"] > 0
    last = [json.loads(line) for line in (compared[0] / run["folder"] / "validation.jsonl").read_text().splitlines()]
    assert run["metrics"]["validation/raw/diffusion_loss"] == last[-1]["diffusion_loss"]
    assert run["validation"] == last[-1:]
    paired = {(e["arm"], e["metric"], e["abscissa"]): e for e in found["paired"]}
    assert {key[2] for key in paired} == {"steps"}
    assert any("not compared at equal training time: validated too rarely" in line for line in found["refused"])
    entry = paired["lpl", "validation/raw/diffusion_loss", "steps"]
    of = {a["name"]: [r["metrics"]["validation/raw/diffusion_loss"] for r in a["runs"]] for a in found["arms"]}
    assert entry["differences"] == [b - a for a, b in zip(of["baseline"], of["lpl"], strict=True)]
    assert entry["interval"][0] < entry["difference"] < entry["interval"][1]
    assert (entry["noise"], entry["noise_from"]) == (0, "repeat")


def test_a_repeat_of_the_baseline_is_equal(compared: tuple[Path, str]) -> None:
    own = [e for e in content(compared[0])["paired"] if e["arm"] == "repeat" and e["abscissa"] == "steps"]
    assert own
    assert {e["verdict"] for e in own} == {"no measurable difference: equal to the last digit"}
    assert all(e["difference"] == 0 and e["interval"] == [0, 0] for e in own)


def test_the_table_and_the_page(compared: tuple[Path, str]) -> None:
    folder, out = compared
    sentences = [entry["sentence"] for entry in content(folder)["verdicts"]]
    assert out.splitlines()[-2:] == sentences
    assert sentences[0].startswith(
        "lpl: too little to tell: no samples were measured, and validation's diffusion loss "
    )
    assert sentences[1].startswith("repeat has the baseline's options: ")
    assert (content(folder)["rows"], content(folder)["at_best"]) == ([], [])
    assert "lpl against the baseline, paired by seed:" in out
    assert "equal steps" in out
    assert "0 of the repeat" in out
    assert "no measurable difference: equal to the last digit" in out
    page = (folder / "report.html").read_text()
    assert page.index("lpl: too little to tell: no samples were measured") < page.index("Validation at equal steps: ")
    assert "Comparison of 3 arms over 2 seeds" in page
    assert "a repeat of the baseline" in page
    assert "0 of the repeat" in page
    assert "noise: what a repeat of the baseline changes" in page


@pytest.mark.slow
def test_finished_runs_are_left_alone(compared: tuple[Path, str], flags: Any, run_cli: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared[0], tmp_path / "again"))
    shutil.rmtree(folder / "lpl" / "seed-1")
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*/*/finished.json")}
    code, out, err = run_cli([*flags(folder), "--seeds", "0", "1", "--allow_changes"])
    assert code == 0, err
    assert out.count("nothing to do") == 5
    assert {f: f.stat().st_mtime_ns for f in before} == before
    pairs = [[(e["arm"], e["metric"], e["difference"]) for e in content(f)["paired"] if e["abscissa"] == "steps"]
             for f in (folder, compared[0])]  # fmt: skip
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--guidance_scale", "1", "3"], "--guidance_scale acts with --reference_dir"),
        (["--num_inference_steps", "8"], "--num_inference_steps acts with --reference_dir"),
        (["--reference_dir=.", "--num_inference_steps", "8", "8"], "--num_inference_steps: 8 is given twice"),
        (
            ["--guidance_scale", "1", "3", "--num_samples=49"],
            "needs 50 samples and images in --reference_dir: 6 are too",
        ),
    ],
)
def test_points_that_cannot_be_compared_are_refused_first(
    flags: Any, run_cli: Any, tmp_path: Path, data: Path, given: list[str], told: str
) -> None:
    if "--num_samples=49" in given:
        given = [*given, f"--reference_dir={data}"]
    code, _, err = run_cli([*flags(tmp_path / "out"), *given])
    assert code == 2
    assert told in err
    assert not list(tmp_path.rglob("unet"))


def test_all_arms_are_checked_before_the_first_trains(flags: Any, run_cli: Any, tmp_path: Path) -> None:
    arms = "baseline: {lpl_weight: 0}\nlpl: {lpl_t_threshold: 5000}\n"
    code, _, err = run_cli(flags(tmp_path / "out", arms))
    assert code == 2
    assert "--lpl_t_threshold 5000" in err
    assert not (tmp_path / "out").exists()


def test_an_arm_that_has_to_stop_is_named_and_left_out(flags: Any, run_cli: Any, tmp_path: Path) -> None:
    arms = "baseline: {lpl_weight: 0}\nwild: {learning_rate: 1.0e+30}\nlpl: {lpl_num_blocks: 1}\n"
    code, out, err = run_cli([*flags(tmp_path / "out", arms), "--seeds", "3"])
    assert code == 0, err
    found = content(tmp_path / "out")
    assert [len(arm["runs"]) for arm in found["arms"]] == [1, 0, 1]
    assert any(line.startswith("wild/seed-3: ") for line in found["refused"])
    assert "wild: no seed is finished in it and in the baseline" in found["refused"]
    assert any("one seed gives no interval" in line for line in found["refused"])
    assert {e["outcome"] for e in found["paired"]} == {"unknown"}
    assert "left out:" in out
    assert "lpl: validation's lpl will not be compared: another yardstick than the baseline's: --lpl_num_blocks" in err
    assert "lpl: validation/raw/lpl: another yardstick than the baseline's: --lpl_num_blocks" in found["refused"]
    assert {e["metric"] for e in found["paired"]} == {"validation/raw/diffusion_loss"}
    assert [arm["yardsticks"] for arm in found["arms"]] == [{}, {}, {"lpl": ["lpl_num_blocks"]}]


@pytest.mark.slow
def test_figures_of_eval_are_compared(
    compared: tuple[Path, str], flags: Any, run_cli: Any, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics_of(folder: Path, options: Any, config: Any, *_: Any) -> measures.EvalMetrics:
        assert options.num_samples == 7
        assert config.run.output_dir == str(folder)
        better = 0.2 + 0.001 * config.run.seed if folder.parent.name == "lpl" else 0.0
        name = "frechet_efficientnet-lite0"
        values = {name: 2.0 + config.run.seed - better - 0.001 * config.run.seed}
        own = ("only here",) if folder == tmp_path / "again" / "lpl" / "seed-1" else ()
        return measures.EvalMetrics(values, {name: "biased: few"}, ("kid: skipped", *own))

    checked = []
    monkeypatch.setattr(measures, "metrics_of", metrics_of)
    monkeypatch.setattr(measures, "check_metrics", lambda *a: checked.append(a))
    folder = Path(shutil.copytree(compared[0], tmp_path / "again"))
    argv = [*flags(folder), "--seeds", "0", "1", "--allow_changes", f"--reference_dir={data}", "--num_samples=7"]
    code, out, err = run_cli(argv)
    assert code == 0, err
    assert len(checked) == 1
    refused, notes = (content(folder)[key] for key in ("refused", "notes"))
    assert notes == ["frechet_efficientnet-lite0: biased: few"]
    assert refused[-2:] == ["kid: skipped", "lpl/seed-1: only here"]
    assert "to be known:\n  frechet_efficientnet-lite0: biased: few\n" in out
    assert '<p class="note">frechet_efficientnet-lite0: biased: few</p>' in (folder / "report.html").read_text()
    found = {(e["arm"], e["metric"]): e for e in content(folder)["paired"] if e["abscissa"] == "steps"}
    entry = found["lpl", "frechet_efficientnet-lite0"]
    assert entry["differences"] == pytest.approx([-0.2, -0.201])
    assert entry["outcome"] == "better"
    assert entry["noise"] == 0


def test_eval_measures_once_with_equal_options(tmp_path: Path, flags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam to lpl eval: which options it gets, and that its eval.json is taken as long as the run is the same."""
    command = pytest.importorskip("lpl.evaluation.command")
    from dataclasses import asdict

    from lpl.config.command_line import parse_compare

    asked = []

    now = {"reference_digest": "images", "prompts_digest": "prompts"}

    def run_eval(options: Any, is_late: Any) -> None:
        asked.append(options)
        metrics = {"recall": {"value": 0.25, "note": "rough: few"}, "precision": {"value": None, "note": "refused"}}
        folder = Path(options.output_dir)
        folder.mkdir(exist_ok=True)
        (folder / "eval.json").write_text(
            json.dumps({"kind": "eval", "options": asdict(options), "metrics": metrics, "refused": ["a"], **now})
        )

    monkeypatch.setattr(command, "run_eval", run_eval)
    given = [f"--reference_dir={tmp_path}", "--num_samples=9", "--prompts=prompts.txt"]
    given += ["--num_inference_steps", "4", "--guidance_scale", "1", "3"]
    options = parse_compare([*flags(tmp_path)[1:], *given])
    finished = tmp_path / "finished.json"
    finished.write_text("{}")

    def measure() -> measures.EvalMetrics:
        return measures.metrics_of(tmp_path, options, options.train, now)

    first = measure()
    assert first[:3] == ({"recall": 0.25}, {"recall": "rough: few"}, ("a",))
    assert [(row["recall"], row["frechet"]) for row in first.rows] == [(0.25, None)]
    assert measure() == first
    assert len(asked) == 1
    found = asked[0]
    assert (found.pretrained_model_name_or_path, found.reference_dir) == (str(tmp_path), str(tmp_path))
    assert (found.num_samples, found.resolution, found.output_dir) == (9, 16, str(tmp_path / "eval"))
    assert (found.prompts, found.num_inference_steps, found.guidance_scale) == ("prompts.txt", 4, (1.0, 3.0))
    later = (tmp_path / "eval" / "eval.json").stat().st_mtime + 10
    os.utime(finished, (later, later))
    measure()
    assert len(asked) == 2
    file = tmp_path / "eval" / "eval.json"
    os.utime(file, (later + 10, later + 10))
    measure()
    assert len(asked) == 2
    for prompts in ("prompts", "other prompts"):
        now = {"reference_digest": "more images", "prompts_digest": prompts}
        measure()
        assert json.loads(file.read_text())["reference_digest"] == "more images"
        os.utime(file, (later + 10, later + 10))
        measure()
    assert len(asked) == 4
    old = json.loads(file.read_text())
    del old["prompts_digest"]  # of a version that did not write it
    file.write_text(json.dumps(old))
    os.utime(file, (later + 10, later + 10))
    measure()
    assert len(asked) == 5
    metrics = {"frechet_efficientnet-lite0": {"value": 7.0}, "recall": {"value": 0.5}}
    points = [{"guidance_scale": g, "num_inference_steps": 4, "metrics": metrics} for g in (1.0, 3.0)]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"points": points}))
    os.utime(file, (later + 10, later + 10))
    found = measure()
    assert (len(asked), found.values) == (5, {})
    assert [(row["guidance"], row["frechet"]) for row in found.rows] == [(1.0, 7.0), (3.0, 7.0)]


@pytest.mark.slow
def test_a_finished_comparison_with_samples_goes_on(
    flags: Any, run_cli: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `lpl eval` itself: samples of the shorter runs make way; eval's refusals and notes come along."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reference, prompts = tiny_images(tmp_path / "reference", count=10, size=16), tmp_path / "prompts.txt"
    (Path(reference) / "metadata.jsonl").unlink()
    prompts.write_text("a lamp\n")
    argv = flags(tmp_path / "out", "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\n", validation_samples=0)
    argv += ["--seeds", "0", f"--reference_dir={reference}", "--num_samples=10"]
    code, _, err = run_cli([*argv, "--max_train_steps=1"])
    assert code == 2
    assert "--prompts is missing" in err
    assert not list((tmp_path / "out").glob("*/*/unet"))
    argv += [f"--prompts={prompts}"]
    (Path(reference) / "torn.png").write_bytes(b"x")
    code, _, err = run_cli([*argv, "--max_train_steps=1"])
    assert code == 2
    assert f"--reference_dir: {Path(reference) / 'torn.png'}: " in err
    assert not list((tmp_path / "out").glob("*/*/unet"))
    (Path(reference) / "torn.png").unlink()
    steps, values = [], []
    for number in (1, 2):
        code, _, err = run_cli([*argv, f"--max_train_steps={number}"])
        assert code == 0, err
        found = content(tmp_path / "out")
        runs = [arm["runs"][0] for arm in found["arms"]]
        steps.append([run["steps"] for run in runs])
        values.append([run["metrics"]["kernel_efficientnet-lite0"] for run in runs])
        (note,) = found["notes"]
        assert note.startswith("kernel_efficientnet-lite0, spectrum_log_error_low")
        assert note.endswith(": rough: only 10 images")
        assert any(line.startswith("precision: refused: needs 50 images") for line in found["refused"])
        assert (tmp_path / "out" / "lpl" / "seed-0" / "eval" / "images" / "00000" / "00000009.png").is_file()
    assert steps == [[1, 1], [2, 2]]
    assert values[0][1] != values[1][1]
    assert not list((tmp_path / "out").glob("*/*/.eval.old"))
    # More images of the reference: all are measured again, and nothing is trained or drawn.
    shutil.copyfile(Path(tiny_images(tmp_path / "more", count=1, size=16, seed=9)) / "0.png", Path(reference) / "z.png")
    drawn = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("eval/images/**/*.png")}
    assert len(drawn) == 20
    code, out, err = run_cli([*argv, "--max_train_steps=2"])
    assert code == 0, err
    assert out.count("nothing to do") == 2
    evals = [json.loads(file.read_text()) for file in sorted((tmp_path / "out").glob("*/*/eval/eval.json"))]
    assert [one["num_reference"] for one in evals] == [11, 11]
    again = [arm["runs"][0]["metrics"]["kernel_efficientnet-lite0"] for arm in content(tmp_path / "out")["arms"]]
    assert all(now != before for now, before in zip(again, values[1], strict=True))
    assert {f: f.stat().st_mtime_ns for f in drawn} == drawn
    prompts.write_text("a chair\n")
    code, _, err = run_cli([*argv, "--max_train_steps=2"])
    assert code == 2
    assert "has samples that were drawn otherwise (prompts " in err
    assert "or remove the folder eval of every run" in err
    assert {f: f.stat().st_mtime_ns for f in drawn} == drawn


@pytest.mark.slow
def test_arms_are_compared_at_their_own_best_guidance(
    flags: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `lpl eval` itself, every point of every run once; a longer list measures what is new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arms = "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\n"
    argv = [*flags(tmp_path / "out", arms, max_train_steps=1), "--seeds", "0", "1", "--num_samples=50"]
    argv += [f"--reference_dir={tiny_images(tmp_path / 'reference', count=50, size=16)}"]
    made: dict[Path, int] = {}
    for scales in (["1", "3"], ["1", "3"], ["1", "3", "4"]):
        code, out, err = run_cli([*argv, "--num_inference_steps", "2", "--guidance_scale", *scales])
        assert code == 0, err
        found = content(tmp_path / "out")
        rows = [(row["arm"], row["seed"], row["guidance"], row["sampling_steps"]) for row in found["rows"]]
        assert rows == [(a, s, float(g), 2) for a in ("baseline", "lpl") for s in (0, 1) for g in scales]
        assert all(row["frechet"] > 0 and row["samples"] == 50 for row in found["rows"])
        files = [
            f for f in (tmp_path / "out").glob("*/*/eval/points/*/**/*.*") if f.suffix == ".png" or "fig" in f.name
        ]
        now = {file: file.stat().st_mtime_ns for file in files}
        assert len(now) == 4 * len(scales) * 51
        assert {file: now[file] for file in made} == made
        made = now
        [entry], [verdict] = found["at_best"], found["verdicts"]
        assert (entry["seeds"], entry["chosen_on"], entry["scales"]) == (
            [0, 1],
            "other seeds",
            [float(g) for g in scales],
        )
        assert (verdict["by"], out.splitlines()[-1]) == ("samples", verdict["sentence"])
        assert {e["metric"].split("/")[0] for e in found["paired"]} == {"validation"}
        page = (tmp_path / "out" / "report.html").read_text()
        assert page.index(' class="sentence') < page.index("Recall over guidance, 2 steps")


def test_minutes_count_for_all_runs_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: Any) -> None:
    from lpl.comparison import run
    from lpl.comparison.arms import read_arms
    from lpl.config.command_line import parse_compare

    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    options = parse_compare([*flags(tmp_path / "out")[1:], "--max_minutes=10", "--seeds", "0"])
    given = []

    def train(config: Any) -> None:
        given.append(config.run.max_minutes)
        now[0] += 6 * 60

    monkeypatch.setattr(run, "run_train", train)
    with pytest.raises(StopRequestedError, match="the same command continues"):
        train_all(options, read_arms(options), 0.0)
    assert given == [10.0, 4.0]


def without_samples_of(folder: str, ranks: tuple[int, ...]) -> Callable[..., int]:
    """generate_into, for which samples of one run are not finite in some processes."""
    from lpl.evaluation.generate import generate_into

    def generate(draw: Any, prompts: Any, images: Path, *args: Any, **options: Any) -> int:
        if folder in str(images) and options["rank"] in ranks:
            raise UserError("samples are not finite")
        return generate_into(draw, prompts, images, *args, **options)

    return generate


@pytest.mark.slow
def test_a_run_that_cannot_be_measured_is_named_and_the_time_counts(
    flags: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpl.comparison import run
    from lpl.evaluation import command

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arms = "baseline: {lpl_weight: 0}\nwild: {lpl_weight: 5}\n"
    argv = [*flags(tmp_path / "out", arms, max_train_steps=1), "--seeds", "0", "--num_samples=10"]
    argv += [f"--reference_dir={tiny_images(tmp_path / 'reference', count=10, size=16)}", "--max_minutes=60"]
    late, trained = [0.0], run.train_all

    def train_all_slowly(*args: Any) -> Any:
        found = trained(*args)
        late[0] = 3600.0
        return found

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    with monkeypatch.context() as slow:
        slow.setattr(run, "train_all", train_all_slowly)
        code, _, err = run_cli(argv)
    assert code == 4
    folder = tmp_path / "out" / "baseline" / "seed-0" / "eval"
    assert f"stopped by --max_minutes before {folder} was measured: the same command continues" in err
    assert not list(tmp_path.glob("out/*/*/eval/images"))
    late[0] = 0.0
    metric, seen = "kernel_efficientnet-lite0", []
    for generate in (without_samples_of("wild/seed-0", (0,)), command.generate_into):
        monkeypatch.setattr(command, "generate_into", generate)
        code, out, err = run_cli(argv)
        assert code == 0, err
        assert out.count("nothing to do") == 2
        found = content(tmp_path / "out")
        seen.append([metric in arm["runs"][0]["metrics"] for arm in found["arms"]])
        fault = "wild/seed-0: its samples are not measured: samples are not finite"
        assert (fault in found["refused"]) == (seen[-1] == [True, False])
        assert (fault in err) == (seen[-1] == [True, False])
        paired = {entry["metric"] for entry in found["paired"]}
        assert "validation/raw/diffusion_loss" in paired
        assert (metric in paired) == (seen[-1] == [True, True])
    assert seen == [[True, False], [True, True]]


def test_runs_of_other_images_are_not_paired(
    flags: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Path(tiny_images(tmp_path / "data", count=6))
    arms = "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\n"
    argv = [*flags(tmp_path / "out", arms, max_train_steps=1, train_data_dir=images), "--seeds", "0"]
    assert run_cli(argv)[0] == 0
    digests = [json.loads(f.read_text())["data"] for f in (tmp_path / "out").glob("*/*/finished.json")]
    assert len(digests) == 2
    assert len(set(digests)) == 1
    (tmp_path / "out" / "compare.json").unlink()
    shutil.rmtree(tmp_path / "out" / "lpl")
    metadata = images / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + '{"file_name": "new.png", "text": "new"}\n')
    shutil.copyfile(Path(tiny_images(tmp_path / "more", count=1, seed=9)) / "0.png", images / "new.png")
    code, _, err = run_cli(argv)
    assert code == 2
    lpl, baseline = (tmp_path / "out" / arm / "seed-0" for arm in ("lpl", "baseline"))
    assert f"error: {lpl}: was trained on other images or captions than {baseline}, which was finished before" in err
    assert f"restore the data and remove {lpl}, or remove {baseline}" in err
    assert not (tmp_path / "out" / "compare.json").exists()
    shutil.rmtree(baseline)
    code, _, err = run_cli(argv)
    assert code == 0, err
    assert content(tmp_path / "out")["paired"]


@pytest.mark.slow
def test_two_processes_go_on_together_after_a_run_that_cannot_be_measured(
    flags: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process alone meets the fault: of the first run, with two more to measure."""
    from lpl.evaluation import command

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "generate_into", without_samples_of("baseline/seed-0", (1,)))
    arms = "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\n"
    argv = [*flags(tmp_path / "out", arms, max_train_steps=1), "--seeds", "0", "1", "--num_samples=20"]
    launch([*argv, f"--reference_dir={tiny_images(tmp_path / 'reference', count=10, size=16)}"], 2)
    found = content(tmp_path / "out")
    fault = "baseline/seed-0: its samples are not measured: samples are not finite"
    assert fault in found["refused"]
    measured = [["kernel_efficientnet-lite0" in run["metrics"] for run in arm["runs"]] for arm in found["arms"]]
    assert measured == [[False, True], [True, True]]
    entry = next(e for e in found["paired"] if e["metric"] == "kernel_efficientnet-lite0")
    assert (entry["seeds"], entry["outcome"]) == (1, "unknown")
    assert any(line.startswith("lpl: ") and "not measured in the baseline, seed 0" in line for line in found["refused"])


@pytest.mark.slow
def test_two_processes_compare_alike(flags: Any, tmp_path: Path) -> None:
    """Each run begins its process group anew; the first process writes."""
    arms = "baseline: {lpl_weight: 0}\nlpl: {lpl_weight: 5}\n"
    launch([*flags(tmp_path / "out", arms), "--seeds", "0", "1"], 2)
    found = content(tmp_path / "out")
    assert [len(arm["runs"]) for arm in found["arms"]] == [2, 2]
    assert found["paired"]
    assert (tmp_path / "out" / "report.html").is_file()
