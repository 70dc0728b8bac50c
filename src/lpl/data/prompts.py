"""Files of prompts: those of validation images and those that `lpl eval` samples are read alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.text import read_lines, read_rows
from lpl.config import require

KEYS = ("prompt", "negative_prompt", "seed")


class Prompt(NamedTuple):
    """What a sample shows."""

    text: str
    negative: str = ""
    """What guidance leads away from; empty: the model's own idea of no prompt."""
    seed: int | None = None
    """Of the first image, one more for each further image; None: drawn for the prompt's number."""


def read_prompts(file: Path, flag: str = "--prompts") -> list[Prompt]:
    """The prompts of a file in order.

    A .txt file has a prompt a line. A line of a .jsonl file is an object with `prompt` and, as one likes,
    `negative_prompt` and `seed`; or with `text`, a caption or a list of them of which the first is taken, and whatever
    else a metadata.jsonl has. Blank lines are passed over.

    Raises:
        UserError: a file that cannot be read, of another kind or without prompts, or a line that is none, by number.
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
    given = row.get("prompt")
    if given is None:
        given = text_of(row, where)
        require(given is not None, f'{where}: no "prompt" and no "text" in it; its keys: {", ".join(row) or "none"}')
    else:
        # A row of metadata may have anything else; here a misspelt key would be lost.
        unknown = sorted(row.keys() - set(KEYS))
        require(not unknown, f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(KEYS)}")
    negative, seed = row.get("negative_prompt"), row.get("seed")
    negative = "" if negative is None else negative
    require(isinstance(given, str) and isinstance(negative, str), f"{where}: prompts must be strings")
    whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
    require(seed is None or whole, f"{where}: seed must be a whole number in 0..{2**32 - 1}, not {seed!r}")
    return Prompt(str(given), negative, seed)
