"""Image files that give no pixels, with a word that the reason has to hold."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from image_bytes import bmp, gif, pack_samples, png, png_chunk, png_header, tiff
from odd_file import Odd, noise, quarters, saved
from PIL import features

DAMAGED = "damaged|cut short"


def not_images() -> Iterator[Odd]:
    """Files that are something else."""
    array = io.BytesIO()
    np.save(array, np.zeros((4, 4, 3)))
    for name, data in {
        "text": b"a photo of a cat\n",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "pickle": pickle.dumps({"image": [1, 2, 3]}),
        "npy": array.getvalue(),
        "zip": b"PK\x03\x04" + bytes(60),
        "zeros": bytes(1000),
        "one byte": b"\xff",
        "png with a wrong mark": b"\x88" + png(noise(1, 4, 4, 3), 8, 2)[1:],
        "png after a text transfer": png(noise(1, 4, 4, 3), 8, 2).replace(b"\r\n", b"\n", 1),
        "webp that is a wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(30),
        "heic": b"\0\0\0\x18ftypheic" + bytes(60),
    }.items():
        yield Odd(name, data, word="not a PNG")
    yield Odd("empty", b"", word="empty")


def damaged() -> Iterator[Odd]:
    """Cut short in many places, and corrupt."""
    rgb = noise(2, 40, 48, 3)
    sound = png(rgb, 8, 2)
    start = sound.index(b"IDAT") + 4
    flipped = bytearray(png_header(48, 40, 8, 2) + png_chunk(b"IDAT", zlib.compress(unpacked(rgb), 0)))
    flipped[len(flipped) // 2] ^= 1
    yield Odd("png with a bit flipped", bytes(flipped) + png_chunk(b"IEND", b""), word=DAMAGED)
    bad_sum = png_header(48, 40, 8, 2) + png_chunk(b"IDAT", sound[start:-16], 1) + png_chunk(b"IEND", b"")
    yield Odd("png with a wrong checksum", bad_sum, word="checksum")
    yield Odd("png with a wrong checksum in its header", sound[:29] + b"abcd" + sound[33:], word=DAMAGED)
    for name, body in {
        "corrupt deflate": b"\x78\x9c" + bytes(range(200)),
        "a hole in it": sound[start : start + 900] + bytes(80) + sound[start + 980 : -16],
        "half the rows": zlib.compress(unpacked(rgb[:20])),
        "an unknown filter": zlib.compress(b"".join(b"\7" + row for row in pack_samples(rgb, 8))),
        "no pixels": b"",
    }.items():
        data = png_header(48, 40, 8, 2) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
        yield Odd(f"png with {name}", data, word=DAMAGED)
    laced = png(rgb[:39], 8, 2, interlaced=True)
    fewer = zlib.compress(zlib.decompress(laced[41:-16])[: -3 * 145])
    data = laced[:33] + png_chunk(b"IDAT", fewer) + png_chunk(b"IEND", b"")
    yield Odd("png interlaced without its last rows", data, word=DAMAGED)
    yield Odd("png of a header alone", png_header(48, 40, 8, 2), word=DAMAGED)
    yield Odd("png of 3 bits", png_header(4, 4, 3, 2) + sound[33:], word=DAMAGED)
    gifs = gif((48, 40), [(1, 2, 3)] * 128, noise(3, 40, 48, top=127))
    rows = [row.tobytes() for row in rgb.astype(np.uint8)]
    smooth = quarters().repeat(3, 0).repeat(3, 1)
    files = {
        "png": sound,
        "png 16": png(rgb * 257, 16, 2),
        "jpeg": saved(rgb, "jpeg"),
        "jpeg progressive": saved(rgb, "jpeg", progressive=True),
        "webp": saved(rgb, "webp"),
        "webp lossless": saved(rgb, "webp", lossless=True),
        "webp animated": saved(rgb, "webp", save_all=True, append_images=[]),
        "gif": gifs,
        "bmp": bmp(rows, 48, 40, 24),
        "tiff": tiff(rgb, 8, 2)[:8] + tiff(rgb, 8, 2)[8:],
        "tiff lzw": saved(smooth, "tiff", compression="tiff_lzw"),
        "tiff tags first": tags_first(rgb),
    }
    if features.check("avif"):
        files["avif"] = saved(rgb, "avif")
    for name, data in files.items():
        for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
            cut = data[: max(13, int(len(data) * share))]
            yield Odd(f"{name}, {share:.0%} of it", cut, word=DAMAGED)
    jpeg = bytearray(saved(rgb, "jpeg"))
    yield Odd("jpeg without its tables", bytes(jpeg).replace(b"\xff\xdb", b"\xff\xe9"), word=DAMAGED)
    yield Odd("jpeg of a thumbnail's start", bytes(jpeg[:2]) + bytes(jpeg[2:200]), word=DAMAGED)
    yield Odd("gif without frames", gifs[: 13 + 384] + b"\x3b", word=DAMAGED)
    yield Odd("tiff that points beyond its end", b"II*\0\xff\xff\xff\x7f", word=DAMAGED)
    deflated = bytearray(tiff(rgb, 8, 2, deflate=True))
    deflated[8:200] = bytes(192)
    yield Odd("tiff of corrupt deflate", bytes(deflated), word=DAMAGED)
    yield Odd("tiff of 99 samples", tiff(rgb, 8, 2, more={277: ("H", [99])}), word=DAMAGED)
    yield Odd("tiff without tags", b"II*\0\x08\0\0\0\0\0\0\0\0\0", word=DAMAGED)
    yield Odd("tiff of float RGB", tiff(rgb.astype(np.float32), 32, 2, more={339: ("H", [3] * 3)}), word=DAMAGED)
    yield Odd("tiff of 16 bits in planes", tiff((rgb * 257).astype(np.uint16), 16, 2, planar=2), word="planes")
    for name, value in (("above one", 1.5), ("below zero", -0.5), ("not a number", np.nan), ("infinite", np.inf)):
        values = np.full((4, 4, 1), value, np.float32)
        yield Odd(f"tiff float {name}", tiff(values, 32, 1, more={339: ("H", [3])}), word="no known white")
    values = np.full((4, 4, 1), 70000, np.int32)
    yield Odd("tiff of 32 bits", tiff(values, 32, 1, more={339: ("H", [2])}), word="no known white")


def unpacked(rgb: np.ndarray) -> bytes:
    """Rows of a PNG before compression."""
    return b"".join(b"\0" + row for row in pack_samples(rgb, 8))


def tags_first(rgb: np.ndarray) -> bytes:
    """A TIFF whose pixels come last, as most writers that are not Pillow do."""
    height, width, _ = rgb.shape
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 2), (273, 4, 1, 140), (277, 3, 1, 3),
        (278, 4, 1, height), (279, 4, 1, rgb.size),
    ]  # fmt: skip
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return head.ljust(140, b"\0") + rgb.astype(np.uint8).tobytes()


def of_absurd_size() -> Iterator[Odd]:
    """Bombs, and images without width."""
    end = png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    yield Odd("png that claims 60000 x 60000", png_header(60000, 60000, 8, 2) + end, word="too large")
    zeros = png_chunk(b"IDAT", zlib.compress(bytes(16001 // 8 * 16000), 9)) + png_chunk(b"IEND", b"")
    yield Odd("png bomb of zeros", png_header(16000, 16000, 1, 0) + zeros, word="too large")
    yield Odd("png of 2 billion x 1", png_header(2**31 - 1, 1, 8, 2) + end, word="too large")
    jpeg = saved(quarters(), "jpeg")
    frame = jpeg.index(b"\xff\xc0") + 5
    huge = jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :]
    yield Odd("jpeg that claims 65500 x 65500", huge, word="too large")
    yield Odd("jpeg of no height", jpeg[:frame] + b"\0\0" + jpeg[frame + 2 :], word=DAMAGED)
    small = gif((4, 4), [(1, 2, 3)], np.zeros((4, 4), int))
    yield Odd("gif that claims 65535 x 65535", small[:6] + b"\xff" * 4 + small[10:], word="too large")
    at = small.index(b"\x2c")
    yield Odd("gif of a huge frame", small[: at + 5] + b"\xff" * 4 + small[at + 9 :], word="too large")
    yield Odd("bmp that claims 50000 x 50000", bmp([], 50000, 50000, 24), word="too large")
    large = {256: ("I", [40000]), 257: ("I", [40000])}
    yield Odd("tiff that claims 40000 x 40000", tiff(noise(1, 4, 4, 3), 8, 2, more=large), word="too large")
    body = b"VP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2
    webp = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    yield Odd("webp that claims 16384 x 16384", webp, word="too large")
    for width, height in ((0, 5), (5, 0), (0, 0)):
        yield Odd(f"png of {width} x {height}", png_header(width, height, 8, 2) + end, word=DAMAGED)
        data = bmp([bytes(15)] * 5, width, height, 24)
        yield Odd(f"bmp of {width} x {height}", data, word=DAMAGED)
    for height, width in ((1, 1), (1, 900), (900, 1)):
        yield Odd(f"png of {width} x {height}", png(noise(4, height, width, 3), 8, 2), word="too small")
        yield Odd(f"gif of {width} x {height}", saved(noise(4, height, width, 3), "gif"), word="too small")


def bad_images() -> list[Odd]:
    """All kinds that have to be refused."""
    return [*not_images(), *damaged(), *of_absurd_size()]
