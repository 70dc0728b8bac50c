"""`lpl data` through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lpl.base.errors import UserError
from lpl.config.command_line import parse_options, parse_train
from lpl.config.commands import MOST_SHOWN, DataReportConfig


@pytest.fixture
def read_data(run_cli: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lpl data` on the six small pictures, in an empty folder; returns what it printed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*argv: str) -> str:
        code, out, err = run_cli(["data", "--train_data_dir", str(data), *argv])
        assert (code, err) == (0, "")
        assert not (tmp_path / "cache").exists()
        return str(out)

    return run


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file()}


def test_report_needs_no_model_and_leaves_the_caches_alone(read_data: Any, tmp_path: Path) -> None:
    out = read_data("--resolution=16", "--train_batch_size=4", "--num_shown=5", "--latent_cache_dir=latents")
    assert out.startswith("verdict      ready to train")
    assert "\nimages       6 in --train_data_dir " in out
    assert "\nepoch        6 draws, 1.5 steps of 4\n" in out
    assert "\ncrops        16 x 16\n" in out
    here = tmp_path / "here"
    report = {"data.json", "draws.png", "cropped.png"}
    assert written(here) == {f"lpl-output/data-report/{name}" for name in report}
    found = json.loads((here / "lpl-output/data-report/data.json").read_text())
    assert len(found["shown"]) == 5
    assert all(draw["caption"].startswith("picture ") for draw in found["shown"])
    with Image.open(here / "lpl-output/data-report/draws.png") as sheet:
        assert sheet.width > 5 * 256


def test_without_pictures(read_data: Any, tmp_path: Path) -> None:
    read_data("--resolution=16", "--output_dir=o")
    read_data("--resolution=16", "--output_dir=o", "--num_shown=0")
    assert written(tmp_path / "here") == {"o/data-report/data.json"}


def test_resolution_is_the_option_or_the_models_or_sdxls(read_data: Any, model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    name = f"--pretrained_model_name_or_path={bare}"

    def resolution(*argv: str) -> int:
        read_data("--num_shown=0", *argv)
        return int(json.loads((tmp_path / "here/lpl-output/data-report/data.json").read_text())["resolution"])

    size = json.loads((bare / "unet" / "config.json").read_text())["sample_size"] * 4
    assert size != 1024
    assert resolution(name) == size
    assert resolution(name, "--resolution=20") == 20
    assert resolution() == 1024


def test_a_run_may_follow_in_the_same_folder_and_is_not_in_the_way(
    read_data: Any, train: Any, base_options: dict[str, Any], tmp_path: Path
) -> None:
    output = f"--output_dir={tmp_path / 'out'}"
    read_data(output, "--resolution=16")
    before = (tmp_path / "out/data-report/data.json").read_bytes()
    run = train()
    assert (run.folder / "model_index.json").is_file()
    assert (run.folder / "data-report/data.json").read_bytes() == before
    config = (run.folder / "config.yaml").read_bytes()
    read_data(output, "--resolution=24", "--seed=4")  # another configuration than the run's
    assert (run.folder / "config.yaml").read_bytes() == config
    assert train().stdout.startswith("nothing to do: ")


def test_too_many_bad_files_fail_after_the_report(run_cli: Any, data: Path, tmp_path: Path) -> None:
    images = shutil.copytree(data, tmp_path / "images")
    (images / "2.png").write_bytes(b"none")
    options = ["data", f"--train_data_dir={images}", f"--output_dir={tmp_path / 'out'}", "--resolution=16"]
    code, out, err = run_cli([*options, "--max_bad_fraction=0"])
    assert code == 2
    assert err.startswith("error: --train_data_dir ")
    assert len(err.splitlines()) == 1
    assert "1 of 6 images cannot be used" in err
    assert "images       5 of 6 in " in out
    assert "bad files    1, listed in " in out
    assert written(tmp_path / "out/data-report") == {"data.json", "draws.png", "cropped.png", "bad_files.jsonl"}
    listed = [json.loads(line) for line in (tmp_path / "out/data-report/bad_files.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["2.png"]
    code, _, err = run_cli(options)  # one is none
    assert (code, err) == (0, "")


def test_data_takes_the_options_of_train() -> None:
    given = ["--config", "sdxl", "--train_data_dir", "x", "--buckets"]
    parsed = parse_options(DataReportConfig, given, "lpl data")
    assert (parsed.train, parsed.num_shown) == (parse_train(given), 24)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_show", "8"], "unknown option --num_show; did you mean num_shown?"),
        (["--num_shown", "-1"], f"--num_shown must lie in 0..{MOST_SHOWN}, not -1"),
        (["--num_shown", str(MOST_SHOWN + 1)], "--num_shown must lie in"),
        (["--background_color", "whale"], "--background_color 'whale' is no colour"),
        (["--train_data_dir", "nowhere"], "--train_data_dir nowhere"),
        (["--pretrained_model_name_or_path", "nowhere"], "--pretrained_model_name_or_path nowhere: no such folder"),
        (["--repeats", "dogs=2"], "--repeats dogs: no image lies in a folder of that name"),
        (["--output_dir", "images/out"], "--output_dir images/out lies in --train_data_dir images: "),
        (["--output_dir", "file"], "--output_dir file: a file is in the way of file"),
    ],
)
def test_faults_are_one_line(
    argv: list[str], message: str, run_cli: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "images")
    Path("file").write_text("mine")
    code, out, err = run_cli(["data", "--train_data_dir", "images", "--resolution", "16", *argv])
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


def test_options_that_cannot_act_are_named(run_cli: Any, data: Path, tmp_path: Path) -> None:
    options = ["data", f"--train_data_dir={data}", f"--output_dir={tmp_path}", "--resolution=16", "--bucket_step=8"]
    code, _, err = run_cli([*options, "--num_shown=0"])
    assert code == 0
    assert err.splitlines() == ["--bucket_step has no effect without --buckets"]


def test_train_has_no_num_shown() -> None:
    with pytest.raises(UserError, match="unknown option --num_shown"):
        parse_train(["--num_shown", "8"])


def test_a_terminal_that_cannot_show_a_name_gets_it_escaped(data: Path, tmp_path: Path) -> None:
    images = shutil.copytree(data, tmp_path / "ünï")
    command = [sys.executable, "-m", "lpl", "data", "--train_data_dir", str(images), "--resolution=16", "--num_shown=0"]
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path / 'out'}"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "\\xfcn\\xef" in done.stdout


def test_nothing_heavy_is_imported_before_the_options_are_checked(data: Path) -> None:
    code = (
        "import sys\n"
        "from lpl.cli import main\n"
        f"for given in (['--background_color', 'whale'], ['--output_dir', {str(data)!r}]):\n"
        "    try:\n"
        f"        main(['data', '--train_data_dir', {str(data)!r}, *given])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 2\n"
        "assert not {'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2
