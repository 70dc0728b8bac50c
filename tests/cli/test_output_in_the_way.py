"""Every command that writes: what others wrote stays, links are not followed, and a second command is refused."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_images

from lpl.base.files import alone_at, alone_in


@pytest.fixture(scope="module")
def argv_of(base_options: dict[str, Any], as_flags: Any, shared: Path) -> Any:
    """The command line of a command for a folder."""
    images = tiny_images(shared / "way-images", count=52)
    (shared / "way-arms.yaml").write_text("plain: {use_lpl: false}\nlpl: {}\n")
    options = {k: v for k, v in base_options.items() if k != "max_train_steps"}
    model = options["pretrained_model_name_or_path"]
    drawn = {"pretrained_model_name_or_path": model, "reference_dir": images, "num_samples": 50, "resolution": 16}
    arms = {"arms": shared / "way-arms.yaml", "validation_samples": 1}

    def argv(command: str, out: Path) -> list[str]:
        return {
            "cache": lambda: ["cache", *as_flags({**options, "output_dir": out})],
            "data": lambda: ["data", *as_flags({**options, "output_dir": out})],
            "check": lambda: ["check", *as_flags({**options, "output_dir": out, "train_data_dir": images})],
            "eval": lambda: ["eval", *as_flags({**drawn, "output_dir": out})],
            "compare": lambda: ["compare", *as_flags({**options, "max_train_steps": 1, **arms, "output_dir": out})],
            "report": lambda: ["report", str(images), "--output", str(out / "page.html")],
            "demo": lambda: ["demo", "--output_dir", str(out)],
            "export_model": lambda: ["demo", "--export_model", str(out)],
            "export_data": lambda: ["demo", "--export_data", str(out)],
            "export": lambda: ["export", str(model), "--output", str(out / "x.safetensors")],
        }[command]()

    return argv


def seen(folder: Path) -> dict[str, Any]:
    return {str(p): p.is_symlink() or p.is_dir() or p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("cache", "bad_files.jsonl"),
        ("data", "data-report/draws.png"),
        ("data", "data-report/data.json"),
        ("data", "data-report@"),
        ("check", "check-report/check.json"),
        ("check", "check-report/maps/x"),
        ("check", "check-report/report.html@"),
        ("eval", "eval.json"),
        ("eval", "samples.json"),
        ("eval", "images/00000/00000000.png"),
        ("eval", "images@"),
        ("compare", "compare.json"),
        ("compare", "report.html"),
        ("compare", "lpl@"),
        ("report", "page.html"),
        ("report", "page.html@"),
        ("demo", "samples.png"),
        ("demo", "arms.yaml"),
        ("demo", "compared@"),
        ("export_model", "model_index.json"),
        ("export_model", "unet/mine.txt"),
        ("export_data", "metadata.jsonl"),
        ("export", "x.safetensors"),
    ],
)
def test_what_others_wrote_stays(argv_of: Any, run_cli: Any, tmp_path: Path, command: str, name: str) -> None:
    file, elsewhere = tmp_path / "out" / name.removesuffix("@"), tmp_path / "elsewhere"
    file.parent.mkdir(parents=True)
    (elsewhere / "mine.txt").parent.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    if name.endswith("@"):
        file.symlink_to(elsewhere)
    else:
        file.write_text("{}")
    before = seen(tmp_path)
    code, _, err = run_cli(argv_of(command, tmp_path / "out"))
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --")
    assert any(part in line for part in file.relative_to(tmp_path / "out").parts), line
    assert seen(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "within"),
    [("data", "data-report"), ("check", "check-report"), ("eval", ""), ("compare", ""), ("demo", ""),
     ("export_model", ""), ("export", None)],
)  # fmt: skip
def test_a_second_command_is_refused(
    argv_of: Any, run_cli: Any, tmp_path: Path, command: str, within: str | None
) -> None:
    out = tmp_path / "out"
    with ExitStack() as stack:
        stack.enter_context(alone_at(out / "x.safetensors", "") if within is None else alone_in(out / within))
        before = seen(tmp_path)
        code, _, err = run_cli(argv_of(command, out))
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "another lpl command is" in line
        assert seen(tmp_path) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--output_dir", ""],
        ["train", "--output_dir="],
        ["train", "--train-data-dir", " "],
        ["eval", "--reference_dir="],
        ["export", ""],
        ["report", "a", ""],
        ["demo", "--export_model", ""],
        ["cache", "prune", "--latent_cache_dir="],
        ["train", "--config", "empty.yaml"],
    ],
)
def test_what_is_given_empty_is_refused(
    run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("output_dir: ''\n")
    code, _, err = run_cli(argv)
    first, *others = err.splitlines()
    assert code == 2
    assert "is given empty: give a value, or leave it out" in first
    assert all(line.startswith("error: ") and "reference_dir" not in line for line in others)  # other faults, if any
    assert [path.name for path in tmp_path.iterdir()] == ["empty.yaml"]


def test_pruning_leaves_what_no_run_cached(run_cli: Any, tmp_path: Path) -> None:
    for name in ("text/mine/a.txt", "latents/x.safetensors", "staged/mine/a", "catalogues/mine/a"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    code, out, _ = run_cli(["cache", "prune", "--latent_cache_dir", str(tmp_path), "--days", "0"])
    assert (code, ": 0 files" in out) == (0, True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "in-use"]) == 4
