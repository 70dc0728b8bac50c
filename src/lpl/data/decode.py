"""From an encoded image file to RGB pixels as a viewer would show them, or to the reason why it gives none."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageColor,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)
from PIL.ImageFile import ImageFile

from lpl.base.errors import UserError, on_one_line
from lpl.data.bad_files import BadImageError, UnreadImageError
from lpl.data.color import has_16_bits, on_background, read_16_bits, split_alpha, to_srgb

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
    if any(end.getbbox() is None for end in ends):  # black may be intended; only counting tells
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


MAX_PIXELS = 178_000_000
"""Largest width x height that is decoded; the largest cameras make 151 million. 4 bytes each while decoding."""
MIN_SIDE = 2
"""Images with a shorter side are tracking pixels and ruled lines, not pictures."""

# Pillow's classes are called rather than Image.open, which tries every format it knows and warns as it goes.
KINDS: dict[str, tuple[type[ImageFile], bytes]] = {
    "PNG": (PngImagePlugin.PngImageFile, rb"\x89PNG\r\n\x1a\n"),
    "JPEG": (JpegImagePlugin.JpegImageFile, rb"\xff\xd8\xff"),
    "WebP": (WebPImagePlugin.WebPImageFile, rb"RIFF....WEBP"),
    "AVIF": (AvifImagePlugin.AvifImageFile, rb"....ftyp(avif|avis|mif1|msf1)"),
    "BMP": (BmpImagePlugin.BmpImageFile, rb"BM"),
    "TIFF": (TiffImagePlugin.TiffImageFile, rb"II[*+]\0|MM\0[*+]"),
    "GIF": (GifImagePlugin.GifImageFile, rb"GIF8[79]a"),
}
"""What reads each kind of file, and how such files begin."""

# What Pillow raises on files that are cut short, corrupt, or so large that they look like an attack.
DECODE_ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError)
DECODE_ERRORS += (ArithmeticError, AssertionError, AttributeError, RuntimeError, struct.error, zlib.error)
DECODE_ERRORS += (Image.DecompressionBombError,)

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

# Faults become reasons here. Set once, at import: warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # where libtiff is a library of its own; it prints to stderr
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def parse_color(text: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a CSS colour: a name, #rgb, #rrggbb, rgb(...), hsl(...).

    Raises:
        UserError: no such colour, or one with transparency; names --background_color.
    """
    try:
        color = ImageColor.getrgb(text)
    except ValueError:
        color = (0, 0, 0, 0)
    if len(color) != 3:
        raise UserError(f"--background_color {text!r} is no colour: give a name such as white, or #rrggbb")
    return color


def decode_image(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decodes a PNG, JPEG, WebP, AVIF, BMP, TIFF or GIF file to mode RGB, as a viewer would show it.

    Upright by its EXIF orientation; its colour profile converted to sRGB (relative colorimetric, black point
    compensated), unless that is broken, made for another kind of pixels, or sRGB already: then the values stand as
    they are; what is transparent shows the background; more than 8 bits are rounded to 8. CMYK without a profile
    becomes (1 - ink)(1 - black); JPEGs hold CMYK inverted, as all viewers take them to. Grey floats are 0..1, grey
    integers beyond 16 bits 0..65535. Of several frames or pages the first is used.
    PNG's gAMA and cHRM and the video colour codes (cICP, nclx) are not applied.

    Raises:
        BadImageError: not such a file, cut short or damaged, above MAX_PIXELS, or below MIN_SIDE. Damage inside a
            JPEG's compressed data is not always noticed: the format has no checksum.
    """
    return decode_with_alpha(data, background)[0]


def decode_with_alpha(
    data: bytes, background: tuple[int, int, int] = (255, 255, 255)
) -> tuple[Image.Image, Image.Image | None]:
    """decode_image (errors too), and the image's opacity, upright, of mode L; None: it has none."""
    kind = _kind(data)
    try:
        image = _open(kind, data)
        is_wide = has_16_bits(image)
        color, alpha = read_16_bits(image, _open(kind, data)) if is_wide else split_alpha(image)
        if kind == "PNG":
            check_png(data, image)
        orientation = _orientation(image)
        rgb = to_srgb(color, image.info.get("icc_profile"))
    except DECODE_ERRORS as error:
        raise BadImageError(_reason(kind, error)) from error
    if alpha is not None:
        rgb = on_background(rgb, alpha, background)
    if orientation not in UPRIGHT:
        return rgb, alpha
    way = UPRIGHT[orientation]
    return rgb.transpose(way), None if alpha is None else alpha.transpose(way)


def _kind(data: bytes) -> str:
    if not data:
        raise BadImageError("the file is empty")
    for kind, (_, beginning) in KINDS.items():
        if re.match(beginning, data, re.DOTALL):
            if kind == "AVIF" and not AvifImagePlugin.SUPPORTED:
                raise UnreadImageError("AVIF, which this Pillow was built without")
            return kind
    raise BadImageError(f"not a {', '.join(KINDS)} file (begins with {data[:12]!r})")


def _open(kind: str, data: bytes) -> ImageFile:
    """Reads the header alone."""
    image = KINDS[kind][0](io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"too large: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if min(width, height) < MIN_SIDE:
        raise BadImageError(f"too small: {width} x {height} pixels")
    return image


def _orientation(image: ImageFile) -> int:
    """EXIF orientation still to be applied; read after loading: a PNG may have it last, and Pillow turns TIFFs."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except DECODE_ERRORS:
        return 1  # EXIF that cannot be parsed says nothing; the pixels are sound


def _reason(kind: str, error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: more than {MAX_PIXELS:,} pixels"
    message = on_one_line(error) or type(error).__name__
    if "runcated" in message:
        return f"{kind} cut short"
    if message == "not identified by this driver":
        message = "its header gives no size or no kind of pixels"
    return f"{kind} damaged, or of a kind that cannot be read ({message})"
