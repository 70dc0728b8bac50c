"""Pictures as data URIs, sized so that all of them together stay within the page's budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from lpl.data.bad_image import BadImageError
from lpl.report.pictures import Picture

TRIES = ((1024, 88), (768, 86), (640, 84), (512, 82), (384, 80), (256, 78), (160, 70))
"""(longest side in pixels, WebP quality), tried until all fit."""
LOSSLESS_BELOW = 128 * 128 + 1
"""Pixels; small pictures are kept exactly."""
SHEET = 2
"""A whole sheet may be so many times larger than a single picture."""


@dataclass(frozen=True)
class Embedded:
    """A picture within the page."""

    uri: str
    width: int
    height: int
    """In pixels, as embedded."""
    original: tuple[int, int]
    """Its size in the file."""


def embed_all(pictures: Sequence[Picture], budget: int) -> tuple[list[Embedded | None], list[str]]:
    """Encodes all pictures at the largest size at which they fit the budget.

    Args:
        pictures: to encode.
        budget: bytes of all data URIs together.

    Returns:
        Each picture (None: it cannot be read), and lines on what was left out or made smaller.
    """
    read: list[Image.Image | None] = []
    notes = []
    for picture in pictures:
        try:
            read.append(picture.read())
        except (OSError, BadImageError) as error:
            read.append(None)
            if (note := f"{picture.file}: cannot be shown ({error})") not in notes:
                notes.append(note)
    for side, quality in TRIES:
        found = _encode_all(read, [p.box is None for p in pictures], side, quality, budget)
        if found is not None:
            smaller = sum(e is not None and (e.width, e.height) != e.original for e in found)
            if smaller:
                notes.append(f"{smaller} pictures are shown smaller than they are, at most {side} pixels a side")
            return found, notes
    notes.append(f"{len(pictures)} pictures are left out: they do not fit the page's size (--max_megabytes)")
    return [None] * len(pictures), notes


def _encode_all(
    pictures: Sequence[Image.Image | None], whole: Sequence[bool], side: int, quality: int, budget: int
) -> list[Embedded | None] | None:
    found: list[Embedded | None] = []
    for picture, is_whole in zip(pictures, whole, strict=True):
        encoded = None if picture is None else encode(picture, side * (SHEET if is_whole else 1), quality)
        budget -= 0 if encoded is None else len(encoded.uri)
        if budget < 0:
            return None
        found.append(encoded)
    return found


def encode(picture: Image.Image, side: int, quality: int) -> Embedded:
    """One picture as WebP, at most side pixels wide and high; small ones without loss."""
    original = picture.size
    if max(original) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    if picture.width * picture.height < LOSSLESS_BELOW:
        picture.save(content, "WEBP", lossless=True)
    else:
        picture.save(content, "WEBP", quality=quality, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Embedded(uri, picture.width, picture.height, original)
