"""Text files that users hand over: every byte string is a text, or an error of one line that names file and place."""

import codecs
import re
from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.base.json_files import parse_json
from lpl.base.text import decode, read_lines, read_rows, read_text

TEXT = '{"text": "café, 一 \U0001f98a"}\nsecond\u2028still second\x0bstill\x85too\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_what_is_read_is_what_was_written(tmp_path: Path, encoding: str, newline: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(TEXT.replace("\n", newline).encode(encoding))
    assert read_text(file) == decode(file.read_bytes(), "x") == TEXT.removesuffix("\n")
    assert [line for _, line in read_lines(file)] == TEXT.removesuffix("\n").split("\n")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a\ncafé".encode("cp1252"), "line 2: not UTF-8 text (byte 5 of the file): save it as UTF-8"),
        ("a\r\nb\r\nкот".encode("koi8-r"), "line 3: not UTF-8 text (byte 6 of the file)"),
        ("кот".encode("utf-16-le"), "line 1: not UTF-8 text, or damaged (it holds the control character U+0004)"),
        (b"a cat\0\0", "line 1: not UTF-8 text, or damaged (it holds the control character U+0000)"),
        (b"one\na\0", "line 2: not UTF-8 text, or damaged (it holds the control character U+0000)"),
        (b"a\0\0\0", "line 1: not UTF-8 text, or damaged (it holds the control character U+0000)"),
        (codecs.BOM_UTF16_LE + b"a", "line 1: not UTF-16 text"),
        (codecs.BOM_UTF16_LE + b"\0\xd8a\0", "line 1: not UTF-16 text"),
        (b"\xff\xfe\0\0a\0\0", "line 1: not UTF-32 text"),
        (codecs.BOM_UTF8 + b"a\n" + codecs.BOM_UTF8 + b"\xff", "line 2: not UTF-8 text (byte 8 of the file)"),
    ],
)
def test_what_is_no_text_is_refused_and_placed(tmp_path: Path, data: bytes, expected: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(data)
    for read in (lambda: read_text(file), lambda: list(read_lines(file))):
        with pytest.raises(UserError, match=re.escape(f"{file}, {expected}")):
            read()


def test_every_short_file_is_a_text_or_one_line(tmp_path: Path) -> None:
    """All files of two bytes of a telling alphabet, with and without more."""
    alphabet = (0, 4, 10, 13, 27, 65, 0x85, 0xBB, 0xC3, 0xD8, 0xEF, 0xFE, 0xFF)
    texts = 0
    for first in alphabet:
        for second in alphabet:
            for rest in (b"", b"\0", b"\xbf", b"a\0", b"\0a\0b"):
                try:
                    text = decode(bytes((first, second)) + rest, "x")
                    text.encode()
                    texts += 1
                except UserError as error:
                    assert str(error).startswith("x, line ")  # noqa: PT017
                    assert "\n" not in str(error)  # noqa: PT017
    assert 50 < texts < 500


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for name, reason in (("missing", "No such file or directory"), (".", "Is a directory"), ("a\0b", "embedded null")):
        for read in (read_text, lambda *given: list(read_lines(*given))):
            with pytest.raises(UserError, match=rf"^--flag y: cannot be read \({reason}"):
                read(tmp_path / name, "--flag y")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1]", "line 2: not a JSON object"),
        ("{", "line 2: not JSON ("),
        ('{"a": "\\ud800"}', "line 2: holds \\ud800, which is no character"),
        ("[" * 100_000, "line 2: lists or objects are nested too deep to be read"),
        ('{"a": ' + "1" * 5000 + "}", "line 2: not JSON ("),
    ],
)
def test_rows_that_are_none(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": "\\ud83e\\udd8a"}\n' + line)
    rows = read_rows(file)
    assert next(rows) == (f"{file}, line 1", {"a": "\U0001f98a"})
    with pytest.raises(UserError, match=re.escape(f"{file}, {expected}")):
        next(rows)


def test_json_names_the_remedy() -> None:
    with pytest.raises(UserError, match=r"^x: not JSON \(.*\): make it anew$"):
        parse_json("{", "x", "make it anew")
