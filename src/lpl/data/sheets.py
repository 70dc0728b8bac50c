"""Text on sheets of pictures, and the note in a sheet's file of what each of its pictures shows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, features

from lpl.base.errors import UserError, on_one_line
from lpl.base.json_files import parse_json
from lpl.data.bad_files import BadImageError
from lpl.data.decode import DECODE_ERRORS

FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arialuni.ttf",
    "msyh.ttc", "PingFang.ttc", "meiryo.ttc", "segoeui.ttf", "arial.ttf",
)  # fmt: skip
"""Tried in turn where Pillow's own font, which has Latin letters only, lacks a letter."""
LETTERS_OF_A_LINE = 2000
"""More than any drawn line holds; longer texts are not measured, as the time for it grows with their length."""
MISSING = "\U0010ffff"
"""A character that no font has: it shows what a font draws for missing ones."""


Color = tuple[int, int, int]


@cache
def fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """Pillow's own font, then those of FONTS that are installed, at a size in pixels.

    Raises:
        UserError: a Pillow without FreeType.
    """
    if not features.check("freetype2"):
        raise UserError("Pillow was built without FreeType, which draws text: pip install --force-reinstall pillow")
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)
    found = [own]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has every letter of a text, or else the one that lacks fewest."""
    letters = {letter for letter in text if not letter.isspace()}
    return min(fonts(size), key=lambda font: sum(not _has(font, letter) for letter in letters))


@cache
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    drawn, instead = font.getmask(letter), font.getmask(MISSING)
    return (drawn.size, bytes(drawn)) != (instead.size, bytes(instead))


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, color: Color | str, size: int) -> None:
    """Draws a text in a font that has its letters, its upper left corner at a place."""
    pen.text(place, text, color, font_for(text, size))


def printable(text: str) -> str:
    """One line without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def wrap(text: str, width: int, size: int, most: int) -> list[str]:
    """Cuts a text into lines of at most `width` pixels, between words where it can; "..." ends the last of `most`."""
    font = font_for(text, size)
    lines: list[str] = []
    line = ""
    for word in printable(text).split(" "):
        joined = f"{line} {word}" if line else word
        if _fits(font, joined, width):
            line = joined
            continue
        if len(lines) > most:
            break  # nothing of it is shown
        if line:
            lines.append(line)
        line = word
        while not _fits(font, line, width) and len(lines) <= most:
            fitting = _letters_that_fit(font, line, width)
            lines.append(line[:fitting])
            line = line[fitting:]
    lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1] + " ..."
    return [*lines[: most - 1], last if font.getlength(last) <= width else shorten(last, width, size, end=0)]


def shorten(text: str, width: int, size: int, end: float = 0.6) -> str:
    """Cuts a part out of a line that is wider than `width` pixels; of what stays, the share `end` is at its end."""
    text, font = printable(text), font_for(text, size)
    if _fits(font, text, width):
        return text

    def cut(kept: int) -> str:
        tail = int(kept * end)
        return f"{text[: kept - tail].rstrip()}...{text[len(text) - tail :]}" if kept > 2 else "..."

    return cut(_largest(2, min(len(text), LETTERS_OF_A_LINE) - 1, lambda kept: _fits(font, cut(kept), width)))


def _fits(font: ImageFont.FreeTypeFont, text: str, width: int) -> bool:
    return len(text) <= LETTERS_OF_A_LINE and font.getlength(text) <= width


def _letters_that_fit(font: ImageFont.FreeTypeFont, text: str, width: int) -> int:
    """How many letters fit, at least one."""
    return _largest(1, min(len(text), LETTERS_OF_A_LINE), lambda n: font.getlength(text[:n]) <= width)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `high` that fits; `low` if none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


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


def png_of(picture: Image.Image, cells: Sequence[Cell] = (), **options: Any) -> bytes:
    """A PNG file that notes the cells, if there are any; options are Pillow's."""
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=cells_note(cells) if cells else None, **options)
    return file.getvalue()


def read_cells(path: Path) -> list[Cell]:
    """The cells that a PNG notes; none where it notes nothing that can be read.

    Raises:
        BadImageError: it is gone, or no picture.
    """
    try:
        with Image.open(path) as picture:
            text, (width, height) = picture.info.get(KEY), picture.size
    except DECODE_ERRORS as error:
        raise BadImageError(on_one_line(error) or type(error).__name__) from error
    if not isinstance(text, str):
        return []
    try:
        cells = [
            Cell(str(c["kind"]), str(c["prompt"]), None if c["seed"] is None else int(c["seed"]), _box(c["box"]))
            for c in parse_json(text, KEY)
        ]
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        return []
    boxes = [cell.box for cell in cells]
    inside = all(0 <= left < right <= width and 0 <= upper < lower <= height for left, upper, right, lower in boxes)
    return cells if inside else []


def _box(corners: list[int]) -> tuple[int, int, int, int]:
    left, upper, right, lower = map(int, corners)
    return left, upper, right, lower
