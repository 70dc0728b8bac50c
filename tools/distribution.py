"""Builds the files for a package index: `python tools/distribution.py https://github.com/OWNER/NAME`.

The repository does not contain its own address, so it is an argument: it goes into the project's URLs, and README's
links and pictures become links into the repository at the version's tag, as an index's page needs them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
BUILT = REPOSITORY / "dist"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def with_absolute_links(text: str, files: str) -> str:
    """Markdown with relative links and pictures made absolute; files: their address, with {} for `blob` or `raw`."""

    def absolute(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        return f"{picture}[{label}]({files.format('raw' if picture else 'blob')}/{target})"

    return LINK.sub(absolute, text)


def with_urls(project: str, address: str, files: str) -> str:
    """pyproject.toml with the URLs that an index shows, added to those that it has."""
    urls = {
        "Repository": address,
        "Documentation": f"{files.format('tree')}/docs",
        "Issues": f"{address}/issues",
        "Changelog": f"{files.format('blob')}/CHANGELOG.md",
    }
    head = "[project.urls]\n"
    assert head in project
    return project.replace(head, head + "".join(f'{name} = "{url}"\n' for name, url in urls.items()))


def stage(folder: Path, address: str) -> None:
    """Writes the tracked files into an empty folder, with the address filled in."""
    named = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, named.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    project, readme = folder / "pyproject.toml", folder / "README.md"
    files = f"{address}/{{}}/v{tomllib.loads(project.read_text())['project']['version']}"
    project.write_text(with_urls(project.read_text(), address, files))
    readme.write_text(with_absolute_links(readme.read_text(), files))


def build(folder: Path, address: str, to: Path) -> None:
    """Builds a source archive and a wheel from the files tracked by git, in an empty folder."""
    from setuptools import build_meta

    stage(folder, address)
    to.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for make in (build_meta.build_sdist, build_meta.build_wheel):
            print(to / make(str(to)))
    finally:
        os.chdir(before)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("https://"):
        sys.exit("usage: python tools/distribution.py https://github.com/OWNER/NAME")
    source = REPOSITORY / "build" / "distribution"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    build(source, sys.argv[1].rstrip("/"), BUILT)
