"""The prompts of validation images: --validation_prompt, or the lines of --validation_prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lpl.config import LoggingConfig, require
from lpl.errors import UserError
from lpl.json_files import parse_row

KEYS = ("prompt", "negative_prompt", "seed")


class Prompt(NamedTuple):
    """What one row of validation images shows."""

    text: str
    negative: str = ""
    """What guidance leads away from; empty: the model's own idea of no prompt."""
    seed: int | None = None
    """Of the first image, one more for each further image; None: drawn for the prompt's number."""


def read_prompts(config: LoggingConfig) -> list[Prompt]:
    """The prompts in order; none if no images are asked for.

    A .txt file has a prompt a line; blank lines are passed over. A line of a .jsonl file is an object with `prompt`
    and, as one likes, `negative_prompt` and `seed`.

    Raises:
        UserError: a file that cannot be read, has no prompts, or a line that is none; the line is named.
    """
    if config.validation_prompts is None:
        return [] if config.validation_prompt is None else [Prompt(config.validation_prompt)]
    path = Path(config.validation_prompts).expanduser()
    flag = f"--validation_prompts {config.validation_prompts}"
    require(path.suffix in (".txt", ".jsonl"), f"{flag}: give a .txt file with a prompt a line, or a .jsonl file")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    require(bool(numbered), f"{flag}: holds no prompt: write one a line")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in numbered]
    return [_parsed(line, f"{flag}, line {number}") for number, line in numbered]


def _parsed(line: str, where: str) -> Prompt:
    entry: Any = parse_row(line, where, 'give an object such as {"prompt": "a red fox"}')
    require("prompt" in entry, f'{where}: give an object such as {{"prompt": "a red fox"}}')
    unknown = sorted(entry.keys() - set(KEYS))
    require(not unknown, f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(KEYS)}")
    text, negative, seed = (entry.get(key, default) for key, default in zip(KEYS, (None, "", None), strict=True))
    require(isinstance(text, str) and isinstance(negative, str), f"{where}: prompts must be strings")
    whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
    require(seed is None or whole, f"{where}: seed must be a whole number in 0..{2**32 - 1}, not {seed!r}")
    return Prompt(text, negative, seed)
