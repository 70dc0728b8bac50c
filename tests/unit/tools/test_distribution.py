"""What goes to a package index: its links, its content, and that it installs and runs on its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
import venv
import zipfile
from pathlib import Path

import distribution
import pytest

ADDRESS = "https://github.com/someone/something"
FILES = f"{ADDRESS}/{{}}/v1.0"


def test_links_of_readme_work_on_an_index() -> None:
    readme = distribution.with_absolute_links((distribution.REPOSITORY / "README.md").read_text(), FILES)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", readme)
    assert len(links) > 20
    for picture, link in links:
        assert link.startswith("https://")
        head = FILES.format("raw" if picture else "blob")
        if link.startswith(ADDRESS):
            assert link.startswith(head)
            assert (distribution.REPOSITORY / link.removeprefix(head + "/").partition("#")[0]).exists(), link


def test_the_urls_are_those_of_the_repository() -> None:
    project = (distribution.REPOSITORY / "pyproject.toml").read_text()
    urls = tomllib.loads(distribution.with_urls(project, ADDRESS, FILES))["project"]["urls"]
    assert urls["Repository"] == ADDRESS
    assert urls["Changelog"] == f"{ADDRESS}/blob/v1.0/CHANGELOG.md"
    assert urls["Paper"].startswith("https://arxiv.org/")


def test_extras_that_pages_name_are_there() -> None:
    extras = tomllib.loads((distribution.REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [distribution.REPOSITORY / "README.md", *(distribution.REPOSITORY / "docs").glob("*.md")]
    named = {
        name
        for page in pages
        for found in re.findall(r"-loss\[([a-z,]+)\]", page.read_text())
        for name in found.split(",")
    }
    start = (distribution.REPOSITORY / "docs" / "start.md").read_text()
    assert {"demo", "eval", "optim"} <= named | set(re.findall(r"^\| `([a-z]+)` \|", start, re.M)) <= set(extras)


@pytest.mark.slow  # builds, then installs torch: minutes
def test_the_wheel_alone_installs_and_trains(tmp_path: Path) -> None:
    """README's recipe by hand, with an interpreter that has nothing else."""
    (tmp_path / "source").mkdir()
    distribution.build(tmp_path / "source", ADDRESS, tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    assert {name.split("/")[0] for name in names} == {"lpl", f"{wheel.name.partition('-py3')[0]}.dist-info"}
    assert not [name for name in names if re.search("demo_weights|pretrain|tests|benchmarks|tools", name)]
    assert f"Project-URL: Repository, {ADDRESS}" in metadata

    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    constraints = str(distribution.REPOSITORY / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, "torch")
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, f"{wheel}[demo]")
    readme = (distribution.REPOSITORY / "README.md").read_text()
    by_hand = re.findall(r"^    lpl ((?:demo --export|plan|train .*--max_train_steps).*)$", readme, re.M)
    assert len(by_hand) == 4
    for command in by_hand:
        run(python, "-m", "lpl", *shlex.split(command.replace("steps 20", "steps 1 --latent_cache_dir cache")))
    assert (tmp_path / "lpl-output" / "model_index.json").is_file()
    assert "site-packages" in run(python, "-c", "import lpl; print(lpl.__file__)")
