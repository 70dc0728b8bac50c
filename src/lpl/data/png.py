"""What Pillow leaves unchecked in a PNG: the checksum of its pixels, and whether there are as many as it says."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from lpl.data.bad_image import BadImageError

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of each pass of an interlaced image: first column and row, and the steps between columns and rows."""
PORTION = 1 << 20


def check_png(data: bytes, loaded: Image.Image) -> None:
    """Checks the pixels of a PNG that Pillow has decoded without complaint.

    Raises:
        BadImageError: a wrong checksum, or fewer rows than the header says; Pillow leaves missing rows black.
    """
    bodies = []
    for body, check in _pixel_chunks(data):
        if zlib.crc32(body, zlib.crc32(b"IDAT")) != check:
            raise BadImageError("PNG damaged: wrong checksum of its pixels")
        bodies.append(body)
    width, height = loaded.size
    ends = [loaded.crop((0, row, width, row + 1)) for row in range(max(0, height - 2), height)]
    if any(end.getbbox() is None for end in ends):  # black may be meant; only counting tells
        _check_length(data, bodies)


def _pixel_chunks(data: bytes) -> Iterator[tuple[memoryview, int]]:
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        length = int.from_bytes(view[at : at + 4], "big")
        end = at + 8 + length
        if view[at + 4 : at + 8] == b"IDAT" and end + 4 <= len(data):
            yield view[at + 8 : end], int.from_bytes(view[end : end + 4], "big")
        at = end + 4


def _check_length(data: bytes, bodies: list[memoryview]) -> None:
    width, height, bits, color_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    expected = 0
    for x, y, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // across), -((y - height) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + (columns * bits * SAMPLES[color_type] + 7) // 8)
    inflated, found = zlib.decompressobj(), 0
    for body in bodies:
        rest: bytes | memoryview = body
        while rest and found < expected:
            found += len(inflated.decompress(rest, PORTION))
            rest = inflated.unconsumed_tail
    if found < expected:
        raise BadImageError("PNG damaged: fewer pixels than its header says")
