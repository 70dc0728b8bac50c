"""The regression check against an older commit sees what it is for; the measures of the code count what they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import house
import pytest
import same_files
import same_results


def test_a_changed_value_of_every_kind_of_file_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert same_files.self_test(tmp_path)
    told = capsys.readouterr().out
    assert "w.safetensors: weight: differs by 1.19e-07 at most" in told
    assert "result.json: /a/0/loss: 0.1 -> 0.10000000000000002" in told


@pytest.mark.parametrize("blind", ["IGNORED", "TEXT", "MOMENT"])
def test_the_self_test_fails_where_too_much_is_ignored(tmp_path: Path, monkeypatch: Any, blind: str) -> None:
    everything = {"IGNORED": re.compile(r".*"), "TEXT": ((r"\d+", "NUMBER"),), "MOMENT": re.compile(r"never")}[blind]
    monkeypatch.setattr(same_files, blind, everything)
    assert not same_files.self_test(tmp_path)


def test_only_what_the_older_commit_knows_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, said in (("older", "error: unknown option --new; did you mean --now?\n"), ("newer", "done\n")):
        for case, content in (("with_new", said), ("both", "equal\n")):
            (tmp_path / side / case).mkdir(parents=True)
            (tmp_path / side / case / "0-train.stderr").write_text(content)
    folders = tmp_path / "older", tmp_path / "newer"
    assert same_results.compare(*folders, ["with_new", "both"], True)
    assert "with_new: skipped: the older commit says 'error: unknown option --new;" in capsys.readouterr().out
    assert not same_results.compare(*folders[::-1], ["with_new"], True)
    assert same_results.compare(*folders[::-1], ["with_new"], False)


def test_renamed_keys_are_compared_under_their_new_name(tmp_path: Path, monkeypatch: Any) -> None:
    for side, content in (("older", '{"cells": 1}'), ("newer", '{"bins": 1}')):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.json").write_text(content)
    folders = tmp_path / "older", tmp_path / "newer"
    assert [item.key for item in same_files.differences(*folders)[0]] == ["/cells", "/bins"]
    monkeypatch.setattr(same_files, "RENAMED", {"cells": "bins"})
    assert same_files.differences(*folders)[0] == []


def test_lines_of_code_are_counted() -> None:
    text = '"""Module\n\ntext."""\nimport os\n\n# why\nx = (\n    1,\n)\n"""What x is."""\ny = """a\nb"""\n'
    assert (house.code_lines(text), house.import_lines(text)) == (6, 1)


def test_circles_and_imports_are_found() -> None:
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == [["a", "b", "c"]]
    tree = ast.parse("import lpl.base\ndef f():\n    from lpl.data import files, KIND\n    from os import path\n")
    known = {"lpl.base", "lpl.data", "lpl.data.files"}
    assert list(house.imports("lpl.x", tree, known)) == ["lpl.base", "lpl.data.files", "lpl.data"]


@pytest.mark.slow  # the tests of rooms below show the same places
def test_the_code_is_measured(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every room has its place."""
    monkeypatch.setattr("sys.argv", ["house.py"])
    house.main()
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {
        "lines",
        "files",
        "circles",
        "options",
    }


def test_rooms_import_downwards_alone() -> None:
    """No circle among modules or rooms, no import of a room above, no file over 400 lines."""
    built = house.read_edges(house.read_trees())
    assert built.number > 500
    assert (built.module_circles, built.room_circles, built.upwards) == ([], [], [])
    long = {file.name for file in (house.SOURCE / "lpl").rglob("*.py") if file.read_text().count("\n") > 400}
    assert not long


def test_a_circle_and_an_import_upwards_are_seen() -> None:
    trees = house.read_trees()
    trees["lpl.base.text"] = ast.parse("def f():\n    from lpl.config import TrainConfig")
    built = house.read_edges(trees)
    assert ("lpl.base.text", "lpl.config") in built.upwards
    assert any("lpl.base.text" in circle for circle in built.module_circles)
    assert any({"base", "config"} <= set(circle) for circle in built.room_circles)


def test_what_the_architecture_page_names_is_there() -> None:
    """Files of rooms, tests and tools; and functions behind a file's name."""
    text = (house.REPOSITORY / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`(?:[^`\n|]{0,12}`([A-Za-z_.]+)`)?", text)
    files = {path: path.read_text() for path in house.REPOSITORY.rglob("*.py") if ".venv" not in path.parts}
    assert len(named) > 40
    for name, what in named:
        found = [source for path, source in files.items() if path.as_posix().endswith(f"/{name}")]
        assert found, name
        word = what.split(".")[-1]
        assert not word or word.endswith("py") or any(word in source for source in found), (name, what)
    for room in house.ROOMS[:-2]:
        assert f"| `{room}` |" in text, room
