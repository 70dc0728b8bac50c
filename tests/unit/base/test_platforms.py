"""What differs on Windows, as far as it can be shown elsewhere: replaced and synced files, locks, encodings."""

import ast
import os
from pathlib import Path

import pytest

import lpl
from lpl.base import files

SOURCES = sorted(Path(lpl.__file__).parent.rglob("*.py"))


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("windows")
def test_a_file_that_another_program_reads_is_replaced_when_it_is_let_go(monkeypatch, tmp_path):
    replace, refused = os.replace, []

    def busy(source, target):
        if len(refused) < 3:
            refused.append(target)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    files.write_atomically(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"
    assert len(refused) == 3


@pytest.mark.usefixtures("windows")
def test_a_file_that_is_never_let_go_stays_as_it_was_and_nothing_is_left_beside_it(monkeypatch, tmp_path):
    (tmp_path / "a.json").write_bytes(b"old")

    def busy(source, target):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(PermissionError):
        files.write_atomically(tmp_path / "a.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"old")]


@pytest.mark.usefixtures("windows")
def test_files_are_synced_with_the_right_to_write(monkeypatch, tmp_path):
    """FlushFileBuffers refuses a handle that may only read, and folders have none."""
    file, seen = tmp_path / "a", []
    file.write_bytes(b"a")
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: seen.append(flags) or opened(path, flags))
    files.sync_file(file)
    files.sync_file(tmp_path)
    assert seen == [os.O_RDWR]


@pytest.mark.usefixtures("windows")
def test_a_lock_is_removed_after_it_is_let_go_and_an_unused_folder_with_it(tmp_path):
    with files.alone_in(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / files.LOCK).is_file()
    assert not any(tmp_path.iterdir())


def texts_without_encoding(source):
    """Lines that read or write texts in what the system takes by default."""
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        text = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
        text |= any(k.arg == "text" and getattr(k.value, "value", None) is True for k in call.keywords)
        if isinstance(call.func, ast.Name) and call.func.id == "open":
            text = not any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in call.args[1:])
        if text:
            yield f"{source.name}:{call.lineno}"


def test_texts_are_read_and_written_in_utf8(tmp_path):
    """Windows takes another one where none is named."""
    (tmp_path / "a.py").write_text("p.read_text()\nopen(p)\nopen(p, 'rb')\nrun(c, text=True)\n", encoding="utf-8")
    assert [*texts_without_encoding(tmp_path / "a.py")] == ["a.py:1", "a.py:2", "a.py:4"]
    assert [line for source in SOURCES for line in texts_without_encoding(source)] == []
