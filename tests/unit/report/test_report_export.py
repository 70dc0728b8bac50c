"""Figures, tables and pictures as files: each stands alone, and holds what the page shows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from lpl.base.errors import UserError
from lpl.report.charts import IntervalRow, Line, Table
from lpl.report.export import check_export, export, latex
from lpl.report.figures import draw, page_colors
from lpl.report.plots import interval_chart, line_chart
from lpl.report.sources import Inputs

LINES = line_chart(
    "Loss: Fréchet", "Of two.", [Line("_a $x$", "1", [1, 2, 3], [1.0, None, 1 / 3], [0.9, None, 0.3], [1.1, None, 0.4]),
    Line("b", "floor", [1, 2], [2.0, 1e-30], best=2)], "steps", "loss", log_y=True,
)  # fmt: skip
ROWS = interval_chart(
    "Values", "Of one.", [IntervalRow("−1 & <b>", "2", 0.5, 0.1, 0.9, noise=0.2, mark=7.0)], "%", True
)


def _page(**given: Any) -> dict[str, Any]:
    nothing = Table(["Package", "all"], [])
    page: dict[str, Any] = {"comparisons": [], "checks": [], "sections": [("a", "A", [LINES, ROWS, LINES])]}
    page |= {"point_tables": [], "evaluations": nothing, "overview": nothing, "configuration": {}, "skipped": ["x"]}
    return page | {"versions": Table(["Package", "all"], [["torch", "2.13"]])} | given


def test_files_stand_alone_and_hold_all_numbers(tmp_path: Path) -> None:
    page = _page(configuration={"All options": Table(["Option", "Value"], [["a_b", "−50 %"], ["c", "→ σ"]])})
    number = export(Inputs(), page, tmp_path / "new" / "folder")
    written = [f for f in (tmp_path / "new" / "folder").rglob("[!.]*") if f.is_file()]  # but for the record
    assert len(written) == number == 3 * 3 + 2 * 2 + 1
    figures = tmp_path / "new" / "folder" / "figures"
    assert sorted(f.name for f in figures.glob("*.svg")) == ["loss-frechet-2.svg", "loss-frechet.svg", "values.svg"]
    for file in figures.glob("*.svg"):
        text = file.read_text()
        tags = {element.tag.rsplit("}")[-1] for element in ElementTree.fromstring(text).iter()}
        assert "path" in tags
        assert not tags & {"text", "link", "image", "script"}  # letters are drawn: no font is needed
        assert not re.search(r'url\((?!#)|@import|href="(?!#)', text)
    for file in figures.glob("*.pdf"):
        content = file.read_bytes()
        assert content.startswith(b"%PDF")
        assert b"/FontFile2" in content  # TrueType, within
    with open(figures / "loss-frechet.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["line", "steps", "loss", "low", "high"]
    assert [float(cell) for cell in rows[3][1:]] == [3, 1 / 3, 0.3, 0.4]
    assert rows[2] == ["_a $x$", "2", "", "", ""]
    tables = tmp_path / "new" / "folder" / "tables"
    assert (tables / "all-options.csv").read_text() == "Option,Value\na_b,-50 %\nc,→ σ\n"
    assert r"a\_b & $-$50 \% \\" in (tables / "all-options.tex").read_text()
    index = json.loads((tmp_path / "new" / "folder" / "export.json").read_text())
    assert index["environment"] == {"all": {"torch": "2.13"}}
    assert [entry["title"] for entry in index["figures"]] == ["Loss: Fréchet", "Values", "Loss: Fréchet"]
    assert index["left_out"] == ["x"]


def test_the_same_page_gives_the_same_files(tmp_path: Path) -> None:
    assert draw(LINES) == draw(LINES)
    export(Inputs(), _page(), tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    check_export(tmp_path)
    export(Inputs(), _page(sections=[("a", "A", [ROWS])]), tmp_path)
    assert {file.name for file in tmp_path.rglob("*.svg")} == {"values.svg"}
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_every_colour_of_the_page_is_found() -> None:
    assert sorted(page_colors()) == [*"12345678", "floor", "ink"]


def test_a_users_text_is_text_in_latex() -> None:
    text = latex(Table(["a&b"], [["\\input{x} $1_2^3 #~%"], ["two\nlines"]]), "c")
    assert r"\textbackslash{}input\{x\} \$1\_2\textasciicircum{}3 \#\textasciitilde{}\%" in text
    assert "two lines" in text


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    check_export(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.svg").write_text("mine")
    with pytest.raises(UserError, match=r"--export .*: figures/mine.svg in it is not what lpl report wrote there"):
        check_export(tmp_path)
    with pytest.raises(UserError, match=r"figures/mine.svg in it is not what lpl report wrote there"):
        export(Inputs(), _page(), tmp_path)
    assert (tmp_path / "figures" / "mine.svg").read_text() == "mine"
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_export(tmp_path / "thesis.tex")
    check_export(tmp_path / "new")


def test_pictures_are_as_large_as_they_are(tmp_path: Path) -> None:
    from lpl.report.sources import Group, Result

    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (300, 200), "red").save(run / "0.jpg", quality=95)
    told = {"prompt": "a <b>", "seed": 1, "index": 0}
    images = [told | {"file": "0.jpg"}, told | {"file": "gone.png", "index": 1}]
    result = Result(run / "eval.json", {"kind": "eval", "images": images})
    export(Inputs([Group("../x", "1", evals=[result])]), _page(), tmp_path / "out")
    with Image.open(tmp_path / "out" / "samples" / "01-a-b" / "x.png") as picture:
        assert picture.size == (300, 200)
