"""Prompts that samples are drawn of."""

from __future__ import annotations

import json
from pathlib import Path

from lpl.config import require
from lpl.errors import UserError


def read_prompts(file: Path, flag: str = "--prompts") -> list[str]:
    """Prompts of a .txt file, one a line, or of a .jsonl file, one JSON object with "text" a line; empty lines not.

    A text that is a list of captions gives its first.

    Raises:
        UserError: no such file, another kind of file, a line that is no such object, or no prompt at all.
    """
    require(file.is_file(), f"{flag} {file}: no such file")
    require(file.suffix in (".txt", ".jsonl"), f"{flag} {file}: expected .txt (a prompt a line) or .jsonl")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not UTF-8 (byte {error.start})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(line.strip() if file.suffix == ".txt" else _text(line, f"{flag} {file}, line {number}"))
    require(bool(found), f"{flag} {file}: no prompt in it")
    return found


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    text = row.get("text") if isinstance(row, dict) else None
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str):
        raise UserError(f'{where}: no "text" in it')
    return text
