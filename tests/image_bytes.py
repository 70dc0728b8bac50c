"""Image files written byte by byte: what Pillow cannot write, or must not be its own witness for."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

Chunks = Sequence[tuple[bytes, bytes]]
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def pack_samples(samples: np.ndarray, bits: int) -> list[bytes]:
    """Rows of (H, W, C) samples, most significant bit first, each padded to whole bytes."""
    flat = samples.reshape(len(samples), -1)
    ones = (flat[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return [row.tobytes() for row in np.packbits(ones.reshape(len(flat), -1).astype(np.uint8), axis=1)]


def png_chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG; its checksum may be set wrong."""
    check = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def png_header(width: int, height: int, bits: int, color_type: int, interlaced: bool = False) -> bytes:
    """Signature and IHDR; colour type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def png(
    samples: np.ndarray,
    bits: int,
    color_type: int,
    before: Chunks = (),
    after: Chunks = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of (H, W, C) samples, with more chunks before and after its pixels."""
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [samples]
    rows = [b"\0" + row for part in passes if part.size for row in pack_samples(part, bits)]
    height, width, _ = samples.shape
    data = png_header(width, height, bits, color_type, interlaced)
    data += b"".join(png_chunk(*chunk) for chunk in before)
    data += png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return data + b"".join(png_chunk(*chunk) for chunk in (*after, (b"IEND", b"")))


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    endian: str = "<",
    planar: int = 1,
    deflate: bool = False,
    more: dict[int, tuple[str, Sequence[int]]] | None = None,
) -> bytes:
    """A TIFF of (H, W, C) samples (already of the bytes' type for 16 and 32 bits), one strip or one a plane.

    Photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 L*a*b*. `more`: further tags,
    number -> (type letter of struct, values).
    """
    height, width, channels = samples.shape
    planes = [samples[..., n : n + 1] for n in range(channels)] if planar == 2 else [samples]
    if bits > 8:
        strips = [plane.astype(plane.dtype.newbyteorder(endian)).tobytes() for plane in planes]
    else:
        strips = [b"".join(pack_samples(plane, bits)) for plane in planes]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    offsets = [8 + sum(map(len, strips[:n])) for n in range(len(strips))]
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * channels), 259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]), 273: ("I", offsets), 277: ("H", [channels]), 278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]), 284: ("H", [planar]), **(more or {}),
    }  # fmt: skip
    body = b"".join(strips)
    body += b"\0" * (len(body) % 2)
    start = 8 + len(body)
    entries, extra = b"", b""
    for number, (letter, values) in sorted(tags.items()):
        value = struct.pack(f"{endian}{len(values)}{letter}", *values)
        if len(value) > 4:
            where = start + 2 + 12 * len(tags) + 4 + len(extra)
            extra += value + b"\0" * (len(value) % 2)
            value = struct.pack(endian + "I", where)
        kind = {"B": 1, "H": 3, "I": 4}[letter]
        entries += struct.pack(endian + "HHI", number, kind, len(values)) + value.ljust(4, b"\0")
    head = (b"II" if endian == "<" else b"MM") + struct.pack(endian + "HI", 42, start)
    return head + body + struct.pack(endian + "H", len(tags)) + entries + b"\0\0\0\0" + extra


def flat_jpeg(blocks: np.ndarray, adobe: int | None = None, segments: Sequence[tuple[int, bytes]] = ()) -> bytes:
    """A baseline JPEG of blocks of 8 x 8 equal pixels, exact, of the stored components (rows, columns, C).

    Args:
        blocks: components as stored, 0..255.
        adobe: transform of an Adobe marker: 0 none, 1 YCC, 2 YCCK; None: no such marker.
        segments: more segments: marker number and body.
    """
    rows, columns, count = blocks.shape
    bits: list[str] = []
    last = np.full(count, 128)
    for row in blocks.astype(int):
        for block in row:
            for n in range(count):
                step = 8 * (block[n] - last[n])  # of the DC coefficient, quantised by 1
                last[n] = block[n]
                size = abs(step).item().bit_length()
                bits.append(f"{size:04b}")
                if size:
                    bits.append(f"{step if step > 0 else step + (1 << size) - 1:0{size}b}")
                bits.append("0")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = bytes(int(text[n : n + 8], 2) for n in range(0, len(text), 8)).replace(b"\xff", b"\xff\0")

    def segment(marker: int, body: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body

    data = b"\xff\xd8"
    if adobe is not None:
        data += segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe]))
    data += b"".join(segment(*one) for one in segments)
    data += segment(0xDB, b"\0" + b"\1" * 64)
    data += segment(0xC4, b"\0" + bytes([0, 0, 0, 12]) + b"\0" * 12 + bytes(range(12)))
    data += segment(0xC4, b"\x10" + bytes([1]) + b"\0" * 15 + b"\0")
    frame = b"".join(bytes([n + 1, 0x11, 0]) for n in range(count))
    data += segment(0xC0, struct.pack(">BHHB", 8, rows * 8, columns * 8, count) + frame)
    data += segment(0xDA, bytes([count]) + b"".join(bytes([n + 1, 0]) for n in range(count)) + b"\0\x3f\0")
    return data + scan + b"\xff\xd9"


def gif(
    canvas: tuple[int, int],
    palette: Sequence[tuple[int, int, int]],
    frame: np.ndarray,
    at: tuple[int, int] = (0, 0),
    transparent: int | None = None,
) -> bytes:
    """A GIF of (width, height) whose one frame (H, W) of indices below 128 lies at (x, y)."""
    data = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0xF6, 0, 0)
    data += b"".join(map(bytes, palette)).ljust(3 * 128, b"\0")
    if transparent is not None:
        data += b"\x21\xf9\x04\x01\0\0" + bytes([transparent]) + b"\0"
    data += b"\x2c" + struct.pack("<HHHHB", *at, frame.shape[1], frame.shape[0], 0) + b"\x07"
    for start in range(0, frame.size, 100):  # cleared before the codes grow from 8 bits to 9
        part = frame.reshape(-1)[start : start + 100].astype(np.uint8).tobytes()
        data += bytes([len(part) + 1]) + b"\x80" + part
    return data + b"\x01\x81\0\x3b"


def bmp(
    rows: Sequence[bytes], width: int, height: int, bits: int, compression: int = 0, masks: bytes = b"", size: int = 40
) -> bytes:
    """A BMP of rows as stored (padded here to 4 bytes); negative height: top row first; 3: bit fields, 1: RLE8."""
    pixels = b"".join(row + b"\0" * (-len(row) % 4 if compression != 1 else 0) for row in rows)
    info = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(pixels), 2835, 2835, 0, 0)
    info = (info + masks).ljust(size, b"\0") if size > 40 else info + masks
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(pixels), 0, 0, 14 + len(info)) + info + pixels
