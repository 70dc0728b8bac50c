"""Prompts that samples are drawn of, and rows of the .jsonl files that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpl.config import require
from lpl.errors import UserError
from lpl.json_files import parse_row


def read_prompts(file: Path, flag: str = "--prompts") -> list[str]:
    """Prompts of a .txt file, one a line, or of a .jsonl file, one JSON object with "text" a line; empty lines not.

    A text that is a list of captions gives its first.

    Raises:
        UserError: no such file, another kind of file, a line that is no such object, or no prompt at all.
    """
    require(file.is_file(), f"{flag} {file}: no such file")
    require(file.suffix in (".txt", ".jsonl"), f"{flag} {file}: expected .txt (a prompt a line) or .jsonl")
    found = []
    if file.suffix == ".txt":
        found = [line for _, line in _lines(file, flag)]
    else:
        for where, row in read_rows(file, flag):
            text = text_of(row, where)
            if text is None:
                raise UserError(f'{where}: no "text" in it')
            found.append(text)
    require(bool(found), f"{flag} {file}: no prompt in it")
    return found


def read_rows(file: Path, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What errors call each row of a .jsonl file, and the row; empty lines are passed over.

    Raises:
        UserError: a file that cannot be read, or a line that is no JSON object.
    """
    for where, line in _lines(file, flag):
        yield where, parse_row(line, where)


def text_of(row: dict[str, Any], where: str) -> str | None:
    """The prompt of a row: its "text", or the first of a list of them; None: it has none.

    Raises:
        UserError: a "text" that is neither.
    """
    text = row.get("text")
    first = (text or [None])[0] if isinstance(text, list) else text
    if first is not None and not isinstance(first, str):
        raise UserError(f'{where}: "text" is neither a text nor a list of texts')
    return first


def _lines(file: Path, flag: str) -> Iterator[tuple[str, str]]:
    """Lines end with a newline alone: other separators of Unicode, such as U+2028, may stand within a prompt."""
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{flag} {file}, line {number}: not UTF-8 (byte {error.start} of the file)") from error
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{flag} {file}, line {number}", line.strip()
