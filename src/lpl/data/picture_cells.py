"""Where in a sheet of pictures each one lies, noted in the PNG itself, so that a report can show them one by one.

The note is a text chunk of the PNG: a JSON list with an object for each picture. Programs that do not know it pass over
it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, PngImagePlugin

from lpl.base.json_files import parse_json
from lpl.data.bad_image import BadImageError
from lpl.data.decode import DECODE_ERRORS
from lpl.errors import UserError

KEY = "lpl-cells"


class Cell(NamedTuple):
    """One picture of a sheet."""

    kind: str
    """What made it: "raw" or "ema" weights, "before", "after", "real"."""
    prompt: str
    seed: int | None
    box: tuple[int, int, int, int]
    """Left, upper, right, lower, in pixels of the sheet; right and lower are outside."""


def cells_note(cells: Sequence[Cell]) -> PngImagePlugin.PngInfo:
    """What `Image.save(..., "PNG", pnginfo=...)` takes to note the cells."""
    note = PngImagePlugin.PngInfo()
    note.add_text(KEY, json.dumps([cell._asdict() for cell in cells]))
    return note


def read_cells(path: Path) -> list[Cell]:
    """The cells that a PNG notes; none where it notes nothing that can be read.

    Raises:
        BadImageError: it is gone, or no picture.
    """
    try:
        with Image.open(path) as picture:
            text, (width, height) = picture.info.get(KEY), picture.size
    except DECODE_ERRORS as error:
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(text, str):
        return []
    try:
        cells = [
            Cell(str(c["kind"]), str(c["prompt"]), None if c["seed"] is None else int(c["seed"]), _box(c["box"]))
            for c in parse_json(text, KEY)
        ]
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        return []
    return cells if all(_inside(cell.box, width, height) for cell in cells) else []


def _box(corners: list[int]) -> tuple[int, int, int, int]:
    left, upper, right, lower = map(int, corners)
    return left, upper, right, lower


def _inside(box: tuple[int, ...], width: int, height: int) -> bool:
    return 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
