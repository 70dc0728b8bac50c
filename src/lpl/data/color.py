"""Pixels of any mode to 8-bit colour and opacity, 16-bit samples included, and colour profiles to sRGB."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile

from lpl.data.bad_files import BadImageError

BITS, PHOTOMETRIC, PLANAR = 258, 262, 284  # TIFF tags
ENDS = ("16B", "16L", "16N")
OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
"""Read in the other byte order, a sample's low byte is taken for its high one."""


def has_16_bits(image: ImageFile) -> bool:
    """Whether an opened image, not yet loaded, has colours of 16-bit samples, which Pillow would cut to 8.

    Raises:
        BadImageError: samples of more than 8 bits in separate, uncompressed planes, which Pillow takes for 8 bits.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANAR) == 2 and max(tags.get(BITS, (1,))) > 8 and any(tile.codec_name == "raw" for tile in image.tile):
        raise BadImageError("TIFF of more than 8 bits a sample in separate planes, uncompressed: cannot be read")
    return image.mode in ("RGB", "RGBA", "CMYK") and any(_raw_mode(tile).endswith(ENDS) for tile in image.tile)


def read_16_bits(image: ImageFile, again: ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """All 16 bits, by decoding twice (the file opened two times, not yet loaded), rounded to 8.

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


INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
UNPACKED = {"L;2": 85, "L;4": 17}
"""Pillow spreads samples of 2 and 4 bits to 0..255, but not the sample value that a PNG declares transparent."""


def split_alpha(image: ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """Loads an opened image and takes it apart.

    Returns:
        Colour of mode L, RGB, CMYK or LAB, and opacity of mode L; None: opaque.

    Raises:
        BadImageError: grey of a range whose white is not known.
        OSError and others of Pillow: a damaged file.
    """
    tiles = image.tile
    image.load()
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None:
        return image, None
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_8_bits(image), _opacity(image, transparent, 1)
    if image.mode in ("1", "L", "RGB"):
        scale = UNPACKED.get(str(tiles[0].args), 1) if tiles else 1
        color = image.convert("L") if image.mode == "1" else image
        return _uncovered(color, _opacity(color, transparent, scale), tiles)
    if image.mode == "P" and not image.has_transparency_data:
        return _uncovered(image.convert("RGB"), None, tiles)
    if image.mode in ("La", "LA"):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A")
    if image.mode in ("P", "PA", "RGBa", "RGBA"):
        rgba = image.convert("RGBA")
        return _uncovered(rgba.convert("RGB"), rgba.getchannel("A"), tiles)
    if image.mode in ("CMYK", "LAB"):
        return image, None
    return image.convert("RGB"), None


def to_srgb(color: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB image in sRGB from one of mode L, RGB, CMYK or LAB and its ICC profile.

    A profile that is broken or of another colour space than the pixels is ignored.
    """
    if color.mode == "LAB":
        return _from_lab().apply(color)
    convert = _conversion(profile, color.mode) if profile else None
    if convert is not None:
        return convert(color)
    return color if color.mode == "RGB" else color.convert("RGB")


def on_background(rgb: Image.Image, alpha: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB pixels over a plain colour, by their opacity (mode L)."""
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


@functools.lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """From pixels with a profile to sRGB; None where there is nothing to do, or no way to."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else 0)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", INTENT, flags)
    except (ImageCms.PyCMSError, OSError):  # broken, or of another colour space
        return None
    if mode == "CMYK":
        return transform.apply
    ramp = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*[ramp] * 3), -1).reshape(1, -1, 3) if mode == "RGB" else ramp[None]
    moved = np.asarray(transform.apply(Image.fromarray(grid)))
    # Most profiles are sRGB's own: colours that stay within one level are better left alone than rounded again.
    if np.abs(moved.astype(int) - (grid if mode == "RGB" else grid[..., None])).max() <= 1:
        return None
    if mode == "RGB":
        return transform.apply
    # Grey of all 256 levels: lcms is off by up to 9 levels in the dark when it is to be fast.
    table = moved[0].T.reshape(-1).tolist()
    return lambda grey: grey.convert("RGB").point(table)


@functools.lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    """L*a*b* (D50) to sRGB; not optimised, else saturated colours are off by up to 23 levels."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", INTENT, ImageCms.Flags.NOOPTIMIZE)


def _opacity(image: Image.Image, transparent: object, scale: int) -> Image.Image | None:
    """0 where pixels equal the colour declared transparent, in samples of 1/scale, else 255."""
    if transparent is None:
        return None
    match = np.asarray(image) == np.asarray(transparent) * scale
    if match.ndim == 3:
        match = match.all(-1)
    return Image.fromarray(np.where(match, 0, 255).astype(np.uint8))


def _uncovered(
    color: Image.Image, alpha: Image.Image | None, tiles: list[Any]
) -> tuple[Image.Image, Image.Image | None]:
    """Makes transparent what the frame of a GIF does not cover of the canvas; frames of other formats fill it."""
    extents = tiles[0].extents if len(tiles) == 1 and tiles[0].codec_name == "gif" else None
    if extents is None or extents == (0, 0, *color.size):
        return color, alpha
    covered = Image.new("L", color.size, 0)
    covered.paste(255 if alpha is None else alpha.crop(extents), extents)
    return color, covered


def _grey_to_8_bits(image: ImageFile) -> Image.Image:
    """Grey of more than 8 bits to L; Pillow itself would clip it at 255."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))
    top = 1.0 if image.mode == "F" else 4095 if bits == (12,) else 65535
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise BadImageError(f"grey values {low:g} to {high:g} have no known white, expected 0 to {top:g}")
    levels = np.rint(values * np.float32(255.0 / top)).astype(np.uint8)
    # Pillow inverts WhiteIsZero for 8 bits only.
    return Image.fromarray(255 - levels if tags.get(PHOTOMETRIC) == 0 else levels)
