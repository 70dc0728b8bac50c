"""Text files from users: how they are decoded, split into lines, and read as JSON lines. Only this file does so.

UTF-8, or UTF-16 and UTF-32 by their byte order mark; UTF-16 also without one where the text begins with a Latin
character, whose other byte is 0. Anything else is an error and never replaced: a wrong caption would be trained on.
Only a newline (any system's) ends a line: U+2028, a vertical tab and other separators belong to the text.
"""

from __future__ import annotations

import ast
import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lpl.base.errors import UserError, require
from lpl.base.json_files import parse_row

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# No text has these; they appear where another encoding is read as UTF-8.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f]")


def decode(data: bytes, where: str) -> str:
    """The text of a file, its line ends as newlines; messages call the file `where`.

    Raises:
        UserError: not UTF-8, nor UTF-16 or UTF-32 that can be recognised.
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
    """For each line of a file that is not blank: its name in messages, and the line without blanks at its ends.

    A file in UTF-8 is never held in memory whole.

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
    """For each line that is not blank of a file of JSON objects: its name in messages, and the object.

    Raises:
        UserError: as read_text, or a line that is no JSON object.
    """
    for place, line in read_lines(path, where):
        yield place, parse_row(line, place, "write one JSON object a line")


def _encoding(start: bytes) -> str:
    """The encoding of a file, from its first four bytes."""
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    first, second = (*start[:2], 1, 1)[:2]
    return "utf-8" if bool(first) == bool(second) else "utf-16-be" if first == 0 else "utf-16-le"


def _decoded(file: BinaryIO, encoding: str, where: str) -> Iterator[str]:
    """The lines of a file: UTF-8 is read line by line, other encodings, whose newline has several bytes, at once."""
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


def parse_keywords(flag: str, text: str | None) -> dict[str, Any]:
    """The keywords of a text such as `d_coef=2.0, betas=(0.9, 0.99)`; values are Python literals (ast.literal_eval).

    Raises:
        UserError: anything but keywords with literal values, or one given twice.
    """
    if not text:
        return {}
    expected = f"--{flag} {text}: expected key=value, ... with numbers, True, False, None, 'texts' or (tuples)"
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise UserError(expected)
        found = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
        raise UserError(expected) from error
    if len(found) != len(call.keywords):
        raise UserError(f"{expected}, each once")
    return found


class Prompt(NamedTuple):
    """What a sample shows."""

    text: str
    negative: str = ""
    """What guidance leads away from; empty: what the model uses for no prompt."""
    seed: int | None = None
    """Seed of the first image, one more for each further image; None: drawn from the prompt's number."""


def read_prompts(file: Path, flag: str = "--prompts") -> list[Prompt]:
    """The prompts of a file in order.

    A .txt file has a prompt a line. A line of a .jsonl file is an object with `prompt` and, optionally,
    `negative_prompt` and `seed`; or with `text` (a caption, or a list of captions whose first is taken) and anything
    else a metadata.jsonl has. Blank lines are skipped.

    Raises:
        UserError: a file that cannot be read, is of another kind or has no prompts; the number of a line without one.
    """
    where, kind = f"{flag} {file}", file.suffix.lower()
    require(kind in (".txt", ".jsonl"), f"{where}: expected .txt with a prompt a line, or .jsonl")
    if kind == ".txt":
        found = [Prompt(line) for _, line in read_lines(file, where)]
    else:
        found = [_prompt_of(row, place) for place, row in read_rows(file, where)]
    require(bool(found), f"{where}: no prompt in it: write one a line")
    return found


def text_of(row: dict[str, Any], where: str) -> str | None:
    """The caption of a row: its "text", or the first of a list of them; None: it has none.

    Raises:
        UserError: a "text" that is neither.
    """
    text = row.get("text")
    first = (text or [None])[0] if isinstance(text, list) else text
    require(first is None or isinstance(first, str), f'{where}: "text" is neither a text nor a list of texts')
    return first


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    keys = ("prompt", "negative_prompt", "seed")
    given = row.get("prompt")
    if given is None:
        given = text_of(row, where)
        require(given is not None, f'{where}: no "prompt" and no "text" in it; its keys: {", ".join(row) or "none"}')
    else:
        # A row of metadata may have anything else; here a misspelt key would be lost.
        unknown = sorted(row.keys() - set(keys))
        require(not unknown, f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(keys)}")
    negative, seed = "" if row.get("negative_prompt") is None else row["negative_prompt"], row.get("seed")
    require(isinstance(given, str) and isinstance(negative, str), f"{where}: prompts must be strings")
    whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
    require(seed is None or whole, f"{where}: seed must be a whole number in 0..{2**32 - 1}, not {seed!r}")
    return Prompt(str(given), negative, seed)
