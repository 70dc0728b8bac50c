"""Odd TIFF and BMP files with the pixels that a viewer shows."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from icc_profiles import from_lab
from image_bytes import bmp, pack_samples, tiff
from odd_file import BACKGROUND, Odd, from_inks, grey, noise, over, saved
from PIL import Image

FLOAT: dict[int, tuple[str, list[int]]] = {339: ("H", [3])}


def tiffs() -> Iterator[Odd]:
    """TIFF: sample types, colour spaces, compressions, byte orders, planes."""
    rgb = noise(41, 9, 13, 3)
    pages = [Image.fromarray(noise(42, 5, 5, 3).astype(np.uint8))]
    for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "raw"):
        yield Odd(f"tiff {how}", saved(rgb, "tiff", compression=how, save_all=True, append_images=pages), rgb)
    for end in "<>":
        for bits, kind in ((8, np.uint8), (16, np.uint16)):
            top = (1 << bits) - 1
            deep = noise(43 + bits, 9, 13, 4, top=top).astype(kind)
            shown = deep * 255.0 / top
            for packed in (False, True):
                name = f"tiff {bits} {'II' if end == '<' else 'MM'}{' deflated' if packed else ''}"
                options = {"endian": end, "deflate": packed}
                yield Odd(f"{name} RGB", tiff(deep[..., :3], bits, 2, **options), shown[..., :3])
                mixed = over(shown[..., :3], shown[..., 3] / 255)
                yield Odd(f"{name} RGBA", tiff(deep, bits, 2, **options, more={338: ("H", [2])}), mixed, 1.1)
                yield Odd(f"{name} CMYK", tiff(deep, bits, 5, **options), from_inks(shown), 1.1)
                if (end, bits) != (">", 16) or not packed:
                    yield Odd(f"{name} grey", tiff(deep[..., :1], bits, 1, **options), grey(shown[..., 0]))
        yield Odd(
            f"tiff float {end}",
            tiff((rgb[..., :1] / 255).astype(np.float32), 32, 1, end, more=FLOAT),
            grey(rgb[..., 0]),
        )
    levels, deep = rgb[..., :1], noise(44, 9, 13, 1, top=65535).astype(np.uint16)
    yield Odd("tiff grey, white is zero", tiff(levels, 8, 0), grey(255 - levels[..., 0]))
    yield Odd("tiff grey 16, white is zero", tiff(deep, 16, 0), grey(255 - deep[..., 0] / 257))
    yield Odd("tiff 1 bit, white is zero", tiff(levels % 2, 1, 0), grey(255 - 255 * (levels[..., 0] % 2)))
    yield Odd("tiff 4 bits", tiff(levels % 16, 4, 1), grey(17 * (levels[..., 0] % 16)))
    twelve = noise(45, 9, 14, 1, top=4095)
    yield Odd("tiff 12 bits", tiff12(twelve), grey(twelve[..., 0] * 255 / 4095))
    colors = noise(46, 16, 3)
    table = {320: ("H", (colors.T.reshape(-1) * 257).tolist())}
    yield Odd("tiff palette", tiff(levels % 16, 4, 3, more=table), colors[levels[..., 0] % 16])
    lab = np.stack([noise(47, 6, 6, top=60) + 100, noise(48, 6, 6, top=40) - 20, noise(49, 6, 6, top=40) - 20], -1)
    yield Odd("tiff L*a*b*", tiff(lab % 256, 8, 8), from_lab(lab / np.array([2.55, 1, 1])), 2.5)
    alpha = noise(50, 9, 13)
    premultiplied = np.rint(rgb * alpha[..., None] / 255).astype(int)
    four = np.concatenate([premultiplied, alpha[..., None]], -1)
    shown = premultiplied + np.array(BACKGROUND) * (1 - alpha[..., None] / 255)
    yield Odd("tiff RGBA premultiplied", tiff(four, 8, 2, more={338: ("H", [1])}), shown, 2)
    four = four.astype(np.uint16) * 257
    yield Odd("tiff RGBA 16 premultiplied", tiff(four, 16, 2, more={338: ("H", [1])}), shown, 1)
    two = np.stack([rgb[..., 0], alpha], -1)
    yield Odd("tiff LA", tiff(two, 8, 1, more={338: ("H", [2])}), over(grey(rgb[..., 0]), alpha / 255), 1)
    two = np.stack([levels[..., 0] % 16, alpha], -1)
    table = {320: ("H", (np.tile(colors, (16, 1)).T.reshape(-1) * 257).tolist()), 338: ("H", [2])}
    yield Odd("tiff palette and alpha", tiff(two, 8, 3, more=table), over(colors[levels[..., 0] % 16], alpha / 255), 1)
    yield Odd("tiff planes", tiff(rgb, 8, 2, planar=2), rgb)
    yield Odd("tiff planes deflated", tiff(rgb, 8, 2, planar=2, deflate=True), rgb)
    yield Odd("tiff planes 16 deflated", tiff((rgb * 257).astype(np.uint16), 16, 2, planar=2, deflate=True), rgb, 1)


def tiff12(samples: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits a sample."""
    rows = b"".join(pack_samples(samples, 12))
    fake = np.frombuffer(rows, np.uint8).reshape(len(samples), -1, 1)
    return tiff(fake, 8, 1, more={256: ("I", [samples.shape[1]]), 258: ("H", [12])})


def bmps() -> Iterator[Odd]:
    """BMP: depths, directions, bit fields, run lengths."""
    rgb = noise(81, 7, 9, 3)
    rows = [row[:, ::-1].astype(np.uint8).tobytes() for row in rgb]
    yield Odd("bmp 24", bmp(rows[::-1], 9, 7, 24), rgb)
    yield Odd("bmp 24 top first", bmp(rows, 9, -7, 24), rgb)
    colors = noise(82, 256, 3)
    table = np.concatenate([colors[:, ::-1], np.zeros((256, 1), int)], -1).astype(np.uint8)
    index = noise(83, 7, 9, top=255)
    shown = colors[index]
    data = bmp([row.astype(np.uint8).tobytes() for row in index[::-1]], 9, 7, 8, masks=table.tobytes())
    yield Odd("bmp palette", data, shown)
    runs = [b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in index[::-1].tolist()]
    yield Odd("bmp run lengths", bmp([*runs, b"\0\1"], 9, 7, 8, 1, masks=table.tobytes()), shown)
    bits = noise(84, 7, 9, 1, top=1)
    data = bmp(pack_samples(bits[::-1], 1), 9, 7, 1, masks=table[:2].tobytes())
    yield Odd("bmp 1 bit", data, colors[bits[..., 0]])
    five = noise(85, 7, 9, 3, top=31)
    words = (five << np.array([10, 5, 0])).sum(-1).astype("<u2")
    yield Odd("bmp 16", bmp([row.tobytes() for row in words[::-1]], 9, 7, 16), five * 255 / 31, 1)
    alpha = noise(86, 7, 9, 1)
    four = np.concatenate([rgb[..., ::-1], alpha], -1).astype(np.uint8)
    rows = [row.tobytes() for row in four[::-1]]
    yield Odd("bmp 32", bmp(rows, 9, 7, 32), rgb)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    yield Odd("bmp 32 with alpha", bmp(rows, 9, 7, 32, 3, masks, size=108), over(rgb, alpha[..., 0] / 255), 1)
