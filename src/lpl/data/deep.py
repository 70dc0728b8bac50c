"""Colour of 16 bits a sample, of which Pillow keeps the high byte alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from lpl.data.bad_image import BadImageError

BITS_PER_SAMPLE, PLANAR = 258, 284  # TIFF tags
ENDS = ("16B", "16L", "16N")
OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
"""Read in the other byte order, a sample's low byte is taken for its high one."""


def is_deep(image: ImageFile) -> bool:
    """Whether an opened image, not yet loaded, has colours of 16-bit samples, which Pillow would cut to 8.

    Raises:
        BadImageError: samples of more than 8 bits in separate, uncompressed planes, which Pillow takes for 8 bits.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANAR) == 2 and max(tags.get(BITS_PER_SAMPLE, (1,))) > 8 and any(tile.codec_name == "raw" for tile in image.tile):
        raise BadImageError("TIFF of more than 8 bits a sample in separate planes, uncompressed: cannot be read")
    return image.mode in ("RGB", "RGBA", "CMYK") and any(_raw_mode(tile).endswith(ENDS) for tile in image.tile)


def read_deep(image: ImageFile, again: ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """All 16 bits, by decoding twice, rounded to 8.

    Args:
        image: opened, not yet loaded.
        again: the same file, opened once more.

    Returns:
        Colour of mode L, RGB or CMYK, and opacity of mode L; None: opaque.

    Raises:
        OSError and others of Pillow: a damaged file.
    """
    raw = _raw_mode(image.tile[0])
    if raw.startswith("LA;"):  # Pillow has no such mode; four bytes a pixel are four channels
        _reread(again, lambda _: "RGBA")
        image.load()
        four = np.asarray(again).astype(np.uint16)
        samples: np.ndarray = four[..., ::2] << 8 | four[..., 1::2]
    else:  # colours multiplied by their opacity (RGBa) as they are: Pillow would divide byte by byte
        _reread(image, lambda mode: mode.replace("a", "A"))
        _reread(again, lambda mode: mode.replace("a", "A")[:-3] + OTHER_BYTE[mode[-3:]])
        samples = np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)
        if raw.startswith("RGBa"):
            alpha = np.maximum(samples[..., 3:], 1).astype(np.float32)
            samples[..., :3] = np.minimum(samples[..., :3] * (65535 / alpha), 65535)
    levels = ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        opaque = (samples != np.asarray(transparent)).any(-1)
        return Image.fromarray(levels), Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    if image.mode == "CMYK":
        return Image.fromarray(levels, "CMYK"), None
    channels = levels.shape[-1]
    if channels == 3:
        return Image.fromarray(levels), None
    color = levels[..., 0] if channels == 2 else levels[..., :3]
    return Image.fromarray(np.ascontiguousarray(color)), Image.fromarray(np.ascontiguousarray(levels[..., -1]))


def _raw_mode(tile: Any) -> str:
    """How a tile's bytes become pixels, in Pillow's words."""
    args = tile.args[0] if isinstance(tile.args, tuple) else tile.args
    return args if isinstance(args, str) else ""


def _reread(image: ImageFile, rename: Callable[[str], str]) -> None:
    """Loads an opened image with another raw mode."""
    tiles = []
    for tile in image.tile:
        raw = rename(_raw_mode(tile))
        tiles.append(tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw))
    image.tile = tiles
    image.load()
