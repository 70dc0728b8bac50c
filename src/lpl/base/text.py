"""Text files that users hand over: how they are decoded, split into lines, and read as JSON lines. Nothing else does.

UTF-8, or UTF-16 and UTF-32 by their byte order mark; UTF-16 also without one where the text begins with a Latin
character, whose other byte is 0. Anything else is an error and never replaced: a wrong caption is trained on. Lines end
with a newline (any system's) alone: U+2028, a vertical tab and other separators belong to the text.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lpl.base.json_files import parse_row
from lpl.errors import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# No text has these; other encodings, read as UTF-8, do.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f]")


def decode(data: bytes, where: str) -> str:
    """The text of a file, its line ends as newlines.

    Args:
        data: the file.
        where: what to call it in a message.

    Raises:
        UserError: not UTF-8, nor UTF-16 or UTF-32 that can be told as such.
    """
    return "\n".join(_decoded(io.BytesIO(data), _encoding(data[:4]), where))


def read_text(path: str | Path, where: str | None = None) -> str:
    """decode() of a file; `where` is its path unless given.

    Raises:
        UserError: also where it cannot be read.
    """
    where = str(path) if where is None else where
    try:
        return decode(Path(path).read_bytes(), where)
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from None


def read_lines(path: str | Path, where: str | None = None) -> Iterator[tuple[str, str]]:
    """What to call each line of a file that is not blank, and the line without blanks at its ends.

    A file in UTF-8 is never held whole.

    Raises:
        UserError: as read_text.
    """
    where = str(path) if where is None else where
    try:
        with open(path, "rb") as file:
            encoding = _encoding(file.read(4))
            file.seek(0)
            for number, line in enumerate(_decoded(file, encoding, where), 1):
                if line.strip():
                    yield f"{where}, line {number}", line.strip()
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from None


def read_rows(path: str | Path, where: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to call each line of a file of JSON objects that is not blank, and the object.

    Raises:
        UserError: as read_text, or a line that is no JSON object.
    """
    for place, line in read_lines(path, where):
        yield place, parse_row(line, place, "write one JSON object a line")


def _encoding(start: bytes) -> str:
    """By the first four bytes of a file."""
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    first, second = (*start[:2], 1, 1)[:2]
    return "utf-8" if bool(first) == bool(second) else "utf-16-be" if first == 0 else "utf-16-le"


def _decoded(file: BinaryIO, encoding: str, where: str) -> Iterator[str]:
    """The lines of a file: of UTF-8 as they come, of other encodings, in which a newline is no single byte, at once."""
    number, offset = 1, 0
    for raw in file if encoding.startswith("utf-8") else [file.read()]:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError as error:
            name = "UTF-8" if encoding.startswith("utf-8") else encoding[:6].upper()
            place = f"byte {offset + error.start} of the file"
            raise UserError(f"{where}, line {number}: not {name} text ({place}): save it as UTF-8") from None
        found = _CONTROL.search(text)
        if found is not None:
            line, code = number + text.count("\n", 0, found.start()), f"U+{ord(found.group()):04X}"
            raise UserError(
                f"{where}, line {line}: not UTF-8 text, or damaged (it holds the control character {code}): save it as "
                "UTF-8"
            )
        encoding = "utf-8" if encoding == "utf-8-sig" else encoding  # the mark stands before the first line alone
        lines = text.removesuffix("\n").replace("\r\n", "\n").removesuffix("\r").replace("\r", "\n").split("\n")
        number, offset = number + len(lines), offset + len(raw)
        yield from lines


def _unreadable(where: str, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{where}: cannot be read ({reason}): correct the path or its permissions")
