"""The documentation site: `python tools/docs_site.py` lays the pages out as in the repository and builds it, strictly.

Pages stay Markdown that a repository host can show: links between them, to examples and to pictures are kept. Notebooks
become pages with their stored outputs, and ```math blocks become MathML, so no page needs another site's scripts. Of a
block's ```language and name, the language is kept: the builder takes a name for text.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "docs" / "zensical.toml"
FOLDER = REPOSITORY / "build" / "docs"
PARTS = ("docs", "examples", "benchmarks/quality")
"""Folders with pages; the pages in the top folder are added."""
SHOWN = {".md", ".py", ".ipynb", ".png", ".css", ".yaml", ".sh"}


class BuildError(Exception):
    """The site cannot be built from the pages."""


def lay_out(source: Path) -> None:
    """Writes pages, and what they show or link to, to the same paths as in the repository."""
    for part in PARTS:
        for file in sorted((REPOSITORY / part).rglob("*")):
            if file.suffix in SHOWN:
                to = source / file.relative_to(REPOSITORY)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to)
    for file in REPOSITORY.glob("*.md"):
        shutil.copy(file, source)
    for notebook in source.rglob("*.ipynb"):
        write_notebook(notebook)
    for page in source.rglob("*.md"):
        text = re.sub(r"^(```\w+) \w+$", r"\1", page.read_text(), flags=re.M)
        page.write_text(with_mathml(text.replace(".ipynb)", ".md)")))


def write_notebook(file: Path) -> None:
    """Writes a page next to a notebook: its texts, its code and its stored outputs."""
    from nbconvert import MarkdownExporter  # takes a second

    text, found = MarkdownExporter().from_filename(
        str(file), {"unique_key": file.stem, "output_files_dir": f"{file.stem}_files"}
    )
    for name, content in found["outputs"].items():
        (file.parent / name).parent.mkdir(exist_ok=True)
        (file.parent / name).write_bytes(content)
    file.with_suffix(".md").write_text(text)


def with_mathml(text: str) -> str:
    """A page with its ```math blocks converted from TeX to MathML."""
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        return f'<div class="formula">{convert(found[1].strip(), display="block")}</div>\n'

    return re.sub(r"^```math\n(.*?)^```\n", formula, text, flags=re.M | re.S)


def build(folder: Path) -> Path:
    """Builds the site in a folder that is emptied first; returns the folder of its pages.

    Raises:
        BuildError: a link or an anchor is broken; the builder has printed which.
    """
    shutil.rmtree(folder, ignore_errors=True)
    lay_out(folder / "source")
    shutil.copy(CONFIG, folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / CONFIG.name)]
    if subprocess.run(command).returncode:
        raise BuildError(f"{CONFIG.name}: the site was not built")
    return folder / "html"


if __name__ == "__main__":
    pages = build(FOLDER)
    print(f"built: python -m http.server --bind 127.0.0.1 --directory {pages}")
