"""The documentation site: strictly built, every link and picture leads somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import docs_site
import pytest

pytest.importorskip("zensical", reason="the extra `docs` is not installed")

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
"""Tags that make a browser ask for something, and where they say what."""
CODE = {"code", "pre", "script", "style"}


class Page(HTMLParser):
    """Ids of a page, what it links to, what it loads, pictures without a text, and lines of text that are no code."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.untold = 0
        self.prose: list[str] = []
        self._code = 0
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if LOADED.get(tag) in given:
            self.loads.append(given[LOADED[tag]])
        self.untold += tag == "img" and not given.get("alt")
        self._code += tag in CODE

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in CODE

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.prose += data.splitlines()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Every page of the built site, by its file."""
    html = docs_site.build(tmp_path_factory.mktemp("site") / "docs")
    return {file: Page(file) for file in html.rglob("*.html") if file.name != "404.html"}


def leads(site: dict[Path, Page], page: Path, link: str) -> bool:
    """Whether a link of a page is to something of the site."""
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path).resolve() if path else page
    target = target / "index.html" if target.is_dir() else target
    return target.is_file() and (not anchor or target not in site or anchor in site[target].ids)


def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    assert len(site) > 20
    assert sum(len(page.links) for page in site.values()) > 1000
    lost = {
        (str(file), link)
        for file, page in site.items()
        for link in page.links
        if not link.startswith(("https://", "mailto:")) and not leads(site, file, link)
    }
    assert not lost


def test_a_page_loads_from_the_site_alone(site: dict[Path, Page]) -> None:
    for file, page in site.items():
        assert page.loads
        for what in page.loads:
            assert what.startswith("data:") or leads(site, file, what), (file, what)
        assert not page.untold, file


def test_no_table_and_no_block_of_code_is_left_as_text(site: dict[Path, Page]) -> None:
    marks = ("| ", "|-", "```")
    left = {(str(file), line) for file, page in site.items() for line in page.prose if line.startswith(marks)}
    assert not left


def test_every_page_is_in_the_menu(site: dict[Path, Page]) -> None:
    """And nothing else is built: the menu of the first page has them all."""
    (first,) = [file for file in site if not any(other.parent in file.parent.parents for other in site)]
    listed = {(first.parent / link).resolve() for link in site[first].links if link.endswith("/") or link == "."}
    assert {file.parent.resolve() for file in site} <= listed | {first.parent.resolve()}


def test_formulas_and_notebooks_are_pages(site: dict[Path, Page]) -> None:
    text = {file.parent.name: file.read_text() for file in site}
    assert text["how_it_works"].count("<math") == 3
    assert "```math" not in text["how_it_works"]
    for name in ("own_loop", "train_compare_judge"):
        assert "<pre" in text[name]
        assert "<img" in text[name]


def test_a_link_that_leads_nowhere_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's own check, on a small site."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "zensical.toml").write_text('[project]\nsite_name="x"\ndocs_dir="source"\nsite_dir="html"\n')
    (tmp_path / "README.md").write_text("# One\n\n[two](docs/two.md#there)\n")
    (tmp_path / "docs" / "two.md").write_text("# Two\n\n## There\n")
    monkeypatch.setattr(docs_site, "REPOSITORY", tmp_path)
    monkeypatch.setattr(docs_site, "CONFIG", tmp_path / "docs" / "zensical.toml")
    assert (docs_site.build(tmp_path / "built") / "docs" / "two" / "index.html").is_file()
    (tmp_path / "docs" / "two.md").write_text("# Two\n\n## Elsewhere\n")
    with pytest.raises(docs_site.BuildError):
        docs_site.build(tmp_path / "built")


def test_notebooks_can_be_read_without_running(tmp_path: Path) -> None:
    """Every cell of code that shows something has its output, and none an error or a path of one machine."""
    notebooks = sorted((docs_site.REPOSITORY / "examples").glob("*.ipynb"))
    assert len(notebooks) == 2
    for notebook in notebooks:
        cells: list[dict[str, Any]] = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert len(outputs) >= 5
        assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
        assert "stderr" not in {output.get("name") for output in outputs}
        assert not [word for word in ("/home/", "/tmp/", "/root/", "/work/") if word in json.dumps(outputs)]
