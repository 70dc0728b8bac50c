"""From an encoded image to pixels in [-1, 1], and the crop that both pixels and size conditioning follow."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpl.diffusion.draws import keyed_uniform
from lpl.errors import UserError

# What Pillow raises on files that are cut short, corrupt, or too large to be meant well.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow finds a PNG's orientation by decoding it whole; without one of these there is none to find.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"orientation", b"Orientation")


@dataclass(frozen=True)
class Crop:
    """Which part of an image is used, after it has been turned upright, resized and (if flip) mirrored.

    Sizes are (height, width) and `top_left` is (y, x), in pixels; `top_left` counts in the resized, mirrored image.
    """

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    top_left: tuple[int, int]
    target_size: tuple[int, int]
    flip: bool

    @property
    def size_conditioning(self) -> tuple[int, ...]:
        """Six ints in SDXL's order: original height, width, crop top, left, target height, width."""
        return self.original_size + self.top_left + self.target_size

    @property
    def upscaled(self) -> bool:
        """Whether resizing enlarges the image."""
        return self.resized_size[0] > self.original_size[0]


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an encoded image once upright, from its header where the format allows.

    Raises:
        UserError: not an image, or too large to be decoded; the message has the name.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = _orientation(image, data) >= 5
            return (image.height, image.width) if turned else (image.width, image.height)
    except DECODE_ERRORS as error:
        raise _undecodable(name, error) from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes an image file to RGB: upright by its EXIF orientation, transparency on white, 16 bits scaled to 8.

    Colour profiles are not applied. Of several frames the first is used.

    Args:
        data: the encoded file.
        name: what to call it in an error.

    Returns:
        An image of mode RGB.

    Raises:
        UserError: a file that cannot be decoded, is cut short, or is too large; the message has the name.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image, data)
            image.load()
            rgb = _to_rgb(image, name)
    except DECODE_ERRORS as error:
        raise _undecodable(name, error) from error
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def plan_crop(width: int, height: int, resolution: int, center: bool, *key: int | str, flip: bool = False) -> Crop:
    """Resizes the short side to the resolution, keeping the aspect, and crops a square.

    Args:
        width: width of the upright image.
        height: its height.
        resolution: side of the square.
        center: crop the centre; else at offsets drawn for (*key, "x") and (*key, "y").
        *key: what the random offsets are drawn for.
        flip: mirror; the crop shows the mirror image of the crop without flip, at x' = resized width - side - x.
    """
    short = min(width, height)
    resized_height, resized_width = (max(resolution, round(side * resolution / short)) for side in (height, width))
    free_y, free_x = resized_height - resolution, resized_width - resolution
    if center:
        y, x = free_y // 2, free_x // 2
    else:
        y, x = int(keyed_uniform(*key, "y") * (free_y + 1)), int(keyed_uniform(*key, "x") * (free_x + 1))
    return Crop(
        original_size=(height, width),
        resized_size=(resized_height, resized_width),
        top_left=(y, free_x - x if flip else x),
        target_size=(resolution, resolution),
        flip=flip,
    )


def render(image: Image.Image, crop: Crop, interpolation: str) -> Tensor:
    """The pixels of a crop.

    Args:
        image: upright RGB image of the crop's original size.
        crop: what to cut out of it.
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos.

    Returns:
        (3, H, W), float32, in [-1, 1], of the crop's target size.

    Raises:
        ValueError: the crop was planned for an image of another size.
    """
    if (image.height, image.width) != crop.original_size:
        raise ValueError(f"crop planned for {crop.original_size}, image is {(image.height, image.width)}")
    (resized_height, resized_width), (y, x), (height, width) = crop.resized_size, crop.top_left, crop.target_size
    if crop.resized_size != crop.original_size:
        image = image.resize((resized_width, resized_height), Image.Resampling[interpolation.upper()])
    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(image.crop((x, y, x + width, y + height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 127.5 - 1.0


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8, still to be applied to an opened image."""
    if image.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION):
        return 1
    if image.format == "TIFF":
        image.load()  # turns the image itself
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # EXIF that cannot be parsed says nothing; the pixels may still be sound


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image, name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits: integers are taken as 16-bit, floats as 0..1; Pillow itself would clip them at 255."""
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= top):
        raise UserError(
            f"{name}: grey values {values.min():g} to {values.max():g} have no known white (expected 0 to {top:g}): "
            "convert it to 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8)).convert("RGB")


def _undecodable(name: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image that Pillow knows"
    return UserError(f"{name}: cannot be decoded ({reason}): replace or remove it")
