"""`lpl report` through the real command line: what the page holds, and that it needs nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lpl.families.sdxl as sdxl

CALLS = {"src", "srcset", "action", "data", "poster", "background", "formaction", "ping", "manifest", "xlink:href"}


class Page(HTMLParser):
    """A page: its tags with their attributes, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.source = file.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data

    def images(self) -> list[dict[str, str | None]]:
        return [found for tag, found in self.tags if tag == "img" and "src" in found]


@pytest.fixture(scope="module")
def run(train_in: Any, shared: Path) -> Path:
    """A run with validation losses and pictures; not to be changed."""
    steps, sdxl.SDXL.steps = sdxl.SDXL.steps, 2
    try:
        prompts = shared / "prompts.jsonl"
        prompts.write_text('{"prompt": "a <red> fox", "seed": 5}\n{"prompt": "snow"}\n')
        options = {"validation_samples": 2, "validation_steps": 2, "max_train_steps": 4, "num_validation_images": 2}
        train_in(shared / "reported", **options, validation_prompts=prompts, use_ema=True)
    finally:
        sdxl.SDXL.steps = steps
    return shared / "reported"


@pytest.fixture(scope="module")
def page(run: Path, run_cli: Any, shared: Path) -> Page:
    """The page of the run."""
    code, out, err = run_cli(["report", str(run), f"--output={shared / 'page.html'}"])
    assert code == 0, err
    assert str(shared / "page.html") in out
    return Page(shared / "page.html")


def test_it_asks_for_nothing(page: Page) -> None:
    """No attribute that loads names a place, no style or script does, and the page forbids it."""
    for tag, found in page.tags:
        for name in CALLS & found.keys():
            assert (found[name] or "").startswith("data:"), (tag, name)
        if "href" in found:
            assert (found["href"] or "").startswith(("#", "data:,")), tag
    assert not [tag for tag, found in page.tags if tag in ("iframe", "object", "embed", "base") or "onclick" in found]
    code = "".join(re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page.source, re.DOTALL))
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|import\(", code)
    policy = [found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert (policy[0] or "").startswith("default-src 'none'; img-src data:;")


def test_pictures_are_by_prompt_and_seed_before_and_after(page: Page) -> None:
    alts = [found["alt"] for found in page.images()]
    assert "a <red> fox · seed 5: before (step 0)" in alts
    assert "a <red> fox · seed 6: after (step 4)" in alts
    assert "snow · image 2: after (step 4)" in alts
    assert len(alts) == 2 * 2 * 2
    assert all((found["src"] or "").startswith("data:image/webp;base64,") for found in page.images())
    assert "a <red> fox" in page.said


def test_losses_shares_and_configuration_are_there(page: Page, run: Path) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", page.source)
    for title in (
        "Diffusion loss, validation",
        "Diffusion loss by timestep bin",
        "Diffusion loss: change by timestep bin",
        "LPL, validation",
        "Diffusion loss, validation, over training time",
        "LPL, validation, over training time",
        "Training loss",
        "LPL&#39;s share of the gradient",
        "LPL by layer",
    ):
        assert title in titles
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["weights"] == "ema"][-1]["diffusion_loss"]
    from lpl.report.numbers import short

    assert short(last, 4) in page.said
    assert "lpl_norm_type" in page.said
    import torch

    assert torch.__version__ in page.said
    assert "weights as trained (raw)" in page.said


def test_two_runs_are_set_against_each_other(run: Path, run_cli: Any, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = (other / "config.yaml").read_text().replace("learning_rate: 0.001", "learning_rate: 0.002")
    (other / "config.yaml").write_text(config)
    code, _, err = run_cli(["report", str(run), str(other)])
    assert code == 0, err
    page = Page(run / "report.html")
    (run / "report.html").unlink()
    assert "What differs" in page.said
    assert re.search(r"learning_rate\s*0\.001\s*0\.002", page.said)
    assert {found["alt"] for found in page.images()} >= {
        "a <red> fox · seed 5: reported", "a <red> fox · seed 5: other", "a <red> fox · seed 5: before (step 0)",
    }  # fmt: skip


def test_what_is_missing_is_said(run: Path, run_cli: Any, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    for name in ("logs", "samples"):
        shutil.rmtree(bare / name)
    for name in ("validation.jsonl", "finished.json"):
        (bare / name).unlink()
    code, _, err = run_cli(["report", str(bare)])
    assert code == 0, err
    said = Page(bare / "report.html").said
    for part in ("the run has not ended", "no validation.jsonl", "no TensorBoard logs"):
        assert part in said


def test_refusals_of_evaluations_are_shown(run: Path, run_cli: Any, tmp_path: Path) -> None:
    """An evaluation within a run's folder comes with it."""
    evaluated = Path(shutil.copytree(run, tmp_path / "run"))
    (evaluated / "eval").mkdir()
    metric = {"value": 12.5, "interval": [11.0, 14.0], "floor": 2.0, "lower_is_better": True, "note": "rough: 9 images"}
    none = {"value": None, "interval": None, "floor": None, "lower_is_better": False, "note": "refused: too few"}
    content = {"kind": "eval", "lpl": "0", "environment": {}, "refused": ["fid: no weights"], "images": [],
               "metrics": {"frechet_efficientnet-lite0": metric, "recall": none}}  # fmt: skip
    (evaluated / "eval" / "eval.json").write_text(json.dumps(content))
    code, _, err = run_cli(["report", str(evaluated)])
    assert code == 0, err
    page = Page(evaluated / "report.html")
    assert "fid: no weights" in page.said
    assert "Fréchet distance (efficientnet-lite0)" in page.said
    assert "Rough: 9 images." in page.said
    assert "12.5  [11, 14]" in page.source
    assert "Recall: refused: too few" in page.said


@pytest.mark.parametrize(("difference", "tone"), [(0.02, "good"), (0.0201, "bad")])
def test_the_walk_is_judged_as_by_the_check(difference: float, tone: str, tmp_path: Path) -> None:
    from lpl.analysis.check.table import faults_of
    from lpl.report.page import as_html, gather
    from lpl.report.sources import Inputs, Result

    content = {"kind": "check", "walk_equals_decode": difference, "components": {}}
    assert bool(faults_of(content)) == (tone == "bad")
    page = as_html(gather(Inputs(checks=[Result(tmp_path / "check.json", content)])))
    assert f'<div class="tile {tone}"><p class="tile-label">Walked decoder' in page


@pytest.mark.parametrize(("weight", "shown"), [(0.0005, "0.0005"), (1.0409, "1.04"), (15000.0, "1.5e+04")])
def test_the_suggested_weight_can_be_given(weight: float, shown: str, tmp_path: Path) -> None:
    from lpl.report.page import as_html, gather
    from lpl.report.sources import Inputs, Result

    content = {"kind": "check", "components": {}, "suggestion": {"lpl_weight": weight}}
    page = as_html(gather(Inputs(checks=[Result(tmp_path / "check.json", content)])))
    [given] = re.findall(r"<code>--lpl_weight (.*?)</code>", page)
    assert given == shown
    assert float(given) == pytest.approx(weight, rel=0.005)


def test_a_check_is_shown_by_its_folder_or_the_one_above(run_cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "check-report"
    folder.mkdir(parents=True)
    content = {
        "kind": "check", "lpl": "0", "environment": {}, "refused": [], "faults": ["vae_decoder in float16: not finite"],
        "warnings": [], "walk_equals_decode": 0.0, "layers": [], "maps": [], "step": None,
        "components": {"vae_decoder": {dtype: {"finite": finite, "max_abs": None, "relative_error": None}
                                       for dtype, finite in (("a", True), ("b", False), ("c", None))}},
        "gradients": [{"t_low": 0, "t_high": 100, "ratio": 0.25, "cosine": 0.5}],
        "suggestion": {"lpl_t_threshold": 700, "lpl_weight": 1.0409327240934, "why": ["because"]},
        "reconstruction": {"psnr_mean": 28.526, "psnr_min": 21.2, "file": "gone.png"},
    }  # fmt: skip
    (folder / "check.json").write_text(json.dumps(content))
    for named in (folder, folder.parent):
        code, _, err = run_cli(["report", str(named), f"--output={tmp_path / 'page.html'}"])
        assert code == 0, err
        page = Page(tmp_path / "page.html")
        said = page.said
        words = [word for word in ("finite", "NOT FINITE", "not on this device") if f"<td>{word}</td>" in page.source]
        assert words == ["finite", "NOT FINITE", "not on this device"]
        for part in (
            "mine/check-report",
            "--lpl_weight 1.04",
            "t < 700",
            "28.5 dB",
            "vae_decoder in float16: not finite",
            "Gradient ratio",
            "because",
            "gone.png: the picture is gone",
            "to the last digit",
        ):
            assert part in said, part


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "name a folder to report on"),
        (["/nowhere"], "/nowhere: no such folder"),
        (["{empty}"], "no config.yaml of a run in it"),
        (["{broken}"], "cannot be read"),
        (["{other}"], "was not written by lpl eval"),
        (["{run}", "--max_megabytes=0.5"], "--max_megabytes must lie in 1..10000, not 0.5"),
        (["{run}", "--output={file}/x.html"], "cannot be written"),
    ],
)
def test_faults(argv: list[str], part: str, run: Path, run_cli: Any, tmp_path: Path) -> None:
    for name in ("empty", "broken", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "eval.json").write_text("{")
    (tmp_path / "other" / "eval.json").write_text('{"kind": "check"}')
    (tmp_path / "file").write_text("")
    places = {name: tmp_path / name for name in ("empty", "broken", "other", "file")} | {"run": run}
    code, out, err = run_cli(["report", *(arg.format(**places) for arg in argv)])
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert part in lines[0]
    assert out == ""
