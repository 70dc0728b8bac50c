"""Letters on pictures: a font that has them, and lines of a given width."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont, features

from lpl.errors import UserError

FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arialuni.ttf",
    "msyh.ttc", "PingFang.ttc", "meiryo.ttc", "segoeui.ttf", "arial.ttf",
)  # fmt: skip
"""Tried in turn where Pillow's own font, which has Latin letters only, lacks a letter."""
LETTERS_OF_A_LINE = 2000
"""No line that is drawn holds as many; longer texts are not measured, as that takes time with their length."""
MISSING = "\U0010ffff"
"""A character of no font: it shows what a font draws instead."""


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


def printable(text: str) -> str:
    """One line without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def wrap(text: str, width: int, size: int, most: int) -> list[str]:
    """Cuts a text into lines of at most so many pixels, between words where it can; "..." ends the last of `most`."""
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
            fitting = _fitting(font, line, width)
            lines.append(line[:fitting])
            line = line[fitting:]
    lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1] + " ..."
    return [*lines[: most - 1], last if font.getlength(last) <= width else shorten(last, width, size, end=0)]


def shorten(text: str, width: int, size: int, end: float = 0.6) -> str:
    """Cuts out of a line what is too much for so many pixels, and keeps so large a share of the rest at its end."""
    text, font = printable(text), font_for(text, size)
    if _fits(font, text, width):
        return text

    def cut(kept: int) -> str:
        tail = int(kept * end)
        return f"{text[: kept - tail].rstrip()}...{text[len(text) - tail :]}" if kept > 2 else "..."

    low, high = 2, min(len(text), LETTERS_OF_A_LINE) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(font, cut(middle), width) else (low, middle - 1)
    return cut(low)


def _fits(font: ImageFont.FreeTypeFont, text: str, width: int) -> bool:
    return len(text) <= LETTERS_OF_A_LINE and font.getlength(text) <= width


def _fitting(font: ImageFont.FreeTypeFont, text: str, width: int) -> int:
    """How many letters of a text fit, at least one."""
    low, high = 1, min(len(text), LETTERS_OF_A_LINE)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
