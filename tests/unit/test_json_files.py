"""One reader for JSON, and shapes that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.base.json_files import NULL, NUMBER, REST, SWITCH, TEXT, difference, parse_row, read_object, whole


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"[" * 100_000, "too deep"),
        (b'{"a": ' * 100_000, "too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_every_fault_names_the_file_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_object(tmp_path / "a.json", "--flag", "write it anew")
    assert str(caught.value).startswith(f"--flag {tmp_path / 'a.json'}: ")
    assert told in str(caught.value)
    assert str(caught.value).endswith(": write it anew")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("none.json", "n" * 256):
        with pytest.raises(UserError, match="cannot be read"):
            read_object(tmp_path / name)


@pytest.mark.parametrize("line", ['{"a": ["x\\ud800"]}', '{"a\\u0000": 1}', '{"a": {"b": "\\udfff"}}'])
def test_texts_that_nothing_can_store_are_refused(line: str) -> None:
    with pytest.raises(UserError, match=r"line 3: holds \\u(d800|0000|dfff), which is no character"):
        parse_row(line, "line 3")
    assert parse_row('{"a": "\\ud83d\\ude00"}', "line 3") == {"a": "\U0001f600"}


SHAPE = {"a": NUMBER, "b?": ([{"c": (TEXT, NULL)}], NULL), "n?": whole(0, 9), "m?": {REST: SWITCH}}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"a": 1}, None),
        ({"a": 1.5, "b": None, "x": "let be"}, None),
        ({"a": 0, "b": [{"c": None}, {"c": "x"}], "n": 9, "m": {"k": True}}, None),
        ([], "it is a list of 0, not an object"),
        ({}, "it has no a"),
        ({"a": True}, "a is true, not a finite number"),
        ({"a": float("inf")}, "a is inf, not a finite number"),
        ({"a": 10**400}, "a is a number that is far too large, not a finite number"),
        ({"a": 1, "b": [{"c": None}, {"c": 3}]}, "b[1].c is 3, not a text or null"),
        ({"a": 1, "b": "x"}, "b is 'x', not a list or null"),
        ({"a": 1, "n": 10}, "n is 10, not a whole number in 0..9"),
        ({"a": 1, "n": 1.0}, "n is 1, not a whole number in 0..9"),
        ({"a": 1, "m": {"k": None}}, "m.k is null, not true or false"),
    ],
)
def test_a_shape_names_the_key(value: Any, told: str | None) -> None:
    assert difference(value, SHAPE) == told
