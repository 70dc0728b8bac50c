"""Reading JSON, whoever wrote it: every fault is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lpl.errors import UserError


def parse_json(text: str | bytes, where: str, then: str = "") -> Any:
    """What a JSON text holds.

    Args:
        text: JSON; bytes are UTF-8.
        where: the flag or file (and line) that errors name.
        then: what to do about it.

    Raises:
        UserError: not JSON, or too deep or too large to be read.
    """
    then = f": {then}" if then else ""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}){then}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}){then}") from error
    except RecursionError as error:
        raise UserError(f"{where}: lists or objects within each other, too deep to be read{then}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: not JSON ({str(error).partition(';')[0]}){then}") from error
    except MemoryError as error:
        raise UserError(f"{where}: too large for the memory{then}") from error


def parse_row(line: str, where: str, then: str = "") -> dict[str, Any]:
    """The JSON object of a line that a user wrote, whose texts are to be used as they are.

    Raises:
        UserError: as parse_json, no object, or half of a surrogate pair or U+0000 in a text.
    """
    row = parse_json(line, where, then)
    instead = f": {then}" if then else ""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object{instead}")
    if "\\u" in line and (found := _unusable(row)):
        raise UserError(f"{where}: holds {found}, which is no character of a text: take it out")
    return row


def read_json(file: Path, flag: str = "", then: str = "") -> Any:
    """What a JSON file holds; see parse_json.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    where = f"{flag} {file}".strip()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}){f': {then}' if then else ''}") from error
    except MemoryError as error:
        raise UserError(f"{where}: too large for the memory{f': {then}' if then else ''}") from error
    return parse_json(content, where, then)


def read_object(file: Path, flag: str = "", then: str = "") -> dict[str, Any]:
    """What a file that is a JSON object holds.

    Raises:
        UserError: as read_json, or other JSON.
    """
    found = read_json(file, flag, then)
    if not isinstance(found, dict):
        raise UserError(f"{f'{flag} {file}'.strip()}: not a JSON object{f': {then}' if then else ''}")
    return found


def object_in(file: Path) -> dict[str, Any]:
    """What a file that is a JSON object holds; empty where it cannot be read or is none."""
    try:
        return read_object(file)
    except UserError:
        return {}


def _unusable(value: Any) -> str | None:
    """Of all texts in a value, the first character that cannot be stored, as it is written in JSON."""
    if isinstance(value, dict):
        return next((found for item in value.items() for each in item if (found := _unusable(each))), None)
    if isinstance(value, list):
        return next((found for item in value if (found := _unusable(item))), None)
    letters = value if isinstance(value, str) else ""
    return next((f"\\u{ord(x):04x}" for x in letters if x == "\0" or "\ud800" <= x <= "\udfff"), None)
