"""Odd image files of every kind, with the pixels that a viewer shows, computed without Pillow's converters."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from icc_profiles import (
    ADOBE_PROFILE,
    CMYK_PROFILE,
    FAINT_PROFILE,
    GREY_PROFILE,
    INKS,
    NEARLY_SRGB_PROFILE,
    P3_PROFILE,
    SRGB_PROFILE,
    from_adobe,
    from_lab,
    from_linear_grey,
    from_p3,
    srgb_encoded,
)
from image_bytes import flat_jpeg, gif, png, tiff
from odd_file import Odd, from_inks, grey, noise, over, quarters, saved
from odd_tiffs import bmps, tiffs
from PIL import Image, features

EXIF = b"Exif\0\0"
"""What EXIF begins with in a JPEG."""


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera stores it, from the EXIF standard: where row 0 and column 0 of the stored image are seen."""
    turned = upright.transpose(1, 0, 2)
    return {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1],
    }[orientation]  # fmt: skip


def exif(orientation: int, endian: str = "<") -> bytes:
    """EXIF that holds an orientation alone."""
    order = b"II" if endian == "<" else b"MM"
    return order + struct.pack(endian + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def oriented() -> Iterator[Odd]:
    """All orientations in all formats that can say so."""
    seen = quarters()
    for n in range(1, 9):
        stored = stored_as(seen, n)
        yield Odd(f"jpeg turned {n}", saved(stored, "jpeg", quality=100, subsampling=0, exif=EXIF + exif(n)), seen, 3)
        yield Odd(f"webp turned {n}", saved(stored, "webp", lossless=True, exif=exif(n, ">")), seen)
        yield Odd(f"png turned {n}", png(stored, 8, 2, before=[(b"eXIf", exif(n, ">"))]), seen)
        yield Odd(f"png turned {n}, said last", png(stored, 8, 2, after=[(b"eXIf", exif(n))]), seen)
        yield Odd(f"tiff turned {n}", tiff(stored, 8, 2, more={274: ("H", [n])}), seen)
        yield Odd(f"tiff deflated turned {n}", tiff(stored, 8, 2, deflate=True, more={274: ("H", [n])}), seen)
        if features.check("avif"):
            data = saved(stored, "avif", quality=100, subsampling="4:4:4", exif=exif(n))
            yield Odd(f"avif turned {n}", data, seen, 3)
    wide = noise(31, 12, 18, 3, top=65535)
    turned = tiff(stored_as(wide, 6).astype(np.uint16), 16, 2, more={274: ("H", [6])})
    yield Odd("tiff of 16 bits turned 6", turned, wide / 257)
    yield Odd("jpeg turned 9", saved(seen, "jpeg", quality=100, subsampling=0, exif=EXIF + exif(9)), seen, 3)


def pngs() -> Iterator[Odd]:
    """PNG: depths, colour types, transparency, interlacing."""
    for bits in (1, 2, 4, 8, 16):
        top = (1 << bits) - 1
        samples = noise(bits, 9, 13, 1, top=top)
        shown = grey(samples[..., 0] * 255 / top)
        key = int(samples[4, 5, 0])
        keyed = over(shown, (samples[..., 0] != key).astype(float))
        yield Odd(f"png grey {bits}", png(samples, bits, 0), shown)
        yield Odd(f"png grey {bits} interlaced", png(samples, bits, 0, interlaced=True), shown)
        yield Odd(f"png grey {bits} tRNS", png(samples, bits, 0, [(b"tRNS", struct.pack(">H", key))]), keyed)
        if bits <= 8:
            colors = noise(50 + bits, top + 1, 3)
            opacity = noise(60 + bits, top + 1)
            palette = (b"PLTE", colors.astype(np.uint8).tobytes())
            shown = colors[samples[..., 0]]
            alphas = (b"tRNS", opacity.astype(np.uint8).tobytes())
            one = (b"tRNS", b"\xff\0" if bits == 1 else b"\xff\xff\0")
            hidden = samples[..., 0] != len(one[1]) - 1
            yield Odd(f"png palette {bits}", png(samples, bits, 3, [palette]), shown)
            yield Odd(f"png palette {bits} interlaced", png(samples, bits, 3, [palette], interlaced=True), shown)
            yield Odd(
                f"png palette {bits} alphas",
                png(samples, bits, 3, [palette, alphas]),
                over(shown, opacity[samples[..., 0]] / 255),
                1,
            )
            yield Odd(f"png palette {bits} one clear", png(samples, bits, 3, [palette, one]), over(shown, hidden * 1.0))
        if bits >= 8:
            rgba = noise(70 + bits, 9, 13, 4, top=top)
            rgba[:3, :, 3] = np.array([0, top // 2, top])[:, None]
            scaled = rgba * 255 / top
            shown = scaled[..., :3]
            clear = (b"tRNS", struct.pack(">HHH", *rgba[2, 2, :3]))
            keyed = over(shown, (rgba[..., :3] != rgba[2, 2, :3]).any(-1) * 1.0)
            for how, flag in (("", False), (" interlaced", True)):
                yield Odd(f"png RGB {bits}{how}", png(rgba[..., :3], bits, 2, interlaced=flag), shown)
                mixed = over(shown, scaled[..., 3] / 255)
                yield Odd(f"png RGBA {bits}{how}", png(rgba, bits, 6, interlaced=flag), mixed, 1.1)
                mixed = over(grey(scaled[..., 0]), scaled[..., 3] / 255)
                yield Odd(f"png LA {bits}{how}", png(rgba[..., ::3], bits, 4, interlaced=flag), mixed, 1.1)
            yield Odd(f"png RGB {bits} tRNS", png(rgba[..., :3], bits, 2, [clear]), keyed)
    rgb = noise(1, 9, 13, 3)
    near = np.tile([257, 514, 771], (4, 4, 1))
    near[0, 0, 2] += 1  # the high bytes are equal: only all 16 bits tell them apart
    opaque = np.ones((4, 4))
    opaque[0, 0] = 0
    clear = (b"tRNS", struct.pack(">HHH", *near[0, 0]))
    yield Odd("png RGB 16 tRNS told by the low byte", png(near, 16, 2, [clear]), over(near / 257, opaque))
    yield Odd("png with a huge EXIF", png(rgb, 8, 2, [(b"eXIf", exif(1) + bytes(3_000_000))]), rgb)
    yield Odd("png with EXIF of garbage", png(rgb, 8, 2, [(b"eXIf", b"MM\0*" + b"\xff" * 40)]), rgb)
    black = rgb * (np.arange(9) < 6)[:, None, None]
    for bits, flag in ((8, False), (8, True), (16, False)):
        name = f"png {bits} with black rows at its end{', interlaced' if flag else ''}"
        yield Odd(name, png(black * (257 if bits == 16 else 1), bits, 2, interlaced=flag), black)
    yield Odd("png with an unknown chunk", png(rgb, 8, 2, [(b"xyZz", b"what")]), rgb)
    yield Odd("png without its end", png(rgb, 8, 2)[:-12], rgb)
    yield Odd("png of extreme aspect", png(noise(3, 2, 4000, 3), 8, 2), noise(3, 2, 4000, 3))


def jpegs() -> Iterator[Odd]:
    """JPEG: progressive, grey, all kinds of CMYK."""
    rgb = quarters()
    yield Odd("jpeg progressive", saved(rgb, "jpeg", quality=100, subsampling=0, progressive=True), rgb, 3)
    for size, colored in ((3, rgb), (2, noise(9, 3, 4, 3).repeat(16, 0).repeat(16, 1))):
        yield Odd(f"jpeg subsampled {size}", saved(colored, "jpeg", quality=100, subsampling=0), colored, 4)
    blocks = noise(4, 3, 5, 4)
    full = blocks.repeat(8, 0).repeat(8, 1)
    yield Odd("jpeg grey", flat_jpeg(blocks[..., :1]), grey(full[..., 0]))
    yield Odd("jpeg RGB by Adobe", flat_jpeg(blocks[..., :3], adobe=0), full[..., :3])
    yield Odd("jpeg CMYK inverted by Adobe", flat_jpeg(255 - blocks, adobe=0), from_inks(full), 1)
    yield Odd("jpeg CMYK without a mark", flat_jpeg(255 - blocks), from_inks(full), 1)
    c, m, y = (blocks[..., n] for n in range(3))
    luma = 0.299 * c + 0.587 * m + 0.114 * y
    ycc = np.stack([luma, 128 + (y - luma) / 1.772, 128 + (c - luma) / 1.402, 255 - blocks[..., 3]], -1)
    ycck = flat_jpeg(np.rint(np.clip(ycc, 0, 255)).astype(int), adobe=2)
    yield Odd("jpeg YCCK", ycck, from_inks(full), 2.5)
    corners = np.array([[[n >> 3, n >> 2, n >> 1, n] for n in range(16)]]) % 2
    lab = [(0, 0, 0) if ink[3] else INKS[tuple(ink[:3])] for ink in corners[0].tolist()]
    shown = from_lab(np.array([lab], float)).repeat(8, 0).repeat(8, 1)
    profile = [(0xE2, b"ICC_PROFILE\0\1\1" + CMYK_PROFILE)]
    yield Odd("jpeg CMYK with a profile", flat_jpeg(255 - corners * 255, 0, profile), shown, 2.5)
    garbage = saved(rgb, "jpeg", quality=100, subsampling=0, exif=EXIF + b"garbage")
    yield Odd("jpeg with EXIF of garbage", garbage, rgb, 3)
    cut = EXIF + exif(6)[:12]
    yield Odd("jpeg with EXIF cut short", saved(rgb, "jpeg", quality=100, subsampling=0, exif=cut), rgb, 3)
    long = saved(rgb, "jpeg", quality=100, subsampling=0, exif=EXIF + exif(1) + bytes(65000))
    yield Odd("jpeg with a huge EXIF", long, rgb, 3)
    yield Odd("jpeg with bytes after its end", flat_jpeg(blocks[..., :1]) + bytes(5000), grey(full[..., 0]))


def profiles() -> Iterator[Odd]:
    """Embedded colour profiles, sound and broken."""
    rgb = noise(11, 9, 13, 3)
    alpha = noise(12, 9, 13, 1)

    def icc(profile: bytes) -> tuple[bytes, bytes]:
        return b"iCCP", b"x\0\0" + zlib.compress(profile)

    for name, profile, shown in (
        ("AdobeRGB", ADOBE_PROFILE, from_adobe(rgb)),
        ("Display P3", P3_PROFILE, from_p3(rgb)),
        ("sRGB", SRGB_PROFILE, rgb),
        ("sRGB within a level", NEARLY_SRGB_PROFILE, rgb),
        ("of a faint black", FAINT_PROFILE, srgb_encoded(rgb / 255)),
        ("broken", ADOBE_PROFILE[:200] + b"\xff" * 100, rgb),
        ("cut", ADOBE_PROFILE[:100], rgb),
        ("empty", b"", rgb),
        ("grey's", GREY_PROFILE, rgb),
        ("CMYK's", CMYK_PROFILE, rgb),
    ):
        tolerance = 0.5 if shown is rgb else 2
        yield Odd(f"png, profile {name}", png(rgb, 8, 2, [icc(profile)]), shown, tolerance)
        if profile:
            tag = {34675: ("B", list(profile))}
            yield Odd(f"tiff, profile {name}", tiff(rgb, 8, 2, more=tag), shown, tolerance)
            yield Odd(f"webp, profile {name}", saved(rgb, "webp", lossless=True, icc_profile=profile), shown, tolerance)
    mixed = over(from_p3(rgb), alpha[..., 0] / 255)
    yield Odd("png RGBA, Display P3", png(np.concatenate([rgb, alpha], -1), 8, 6, [icc(P3_PROFILE)]), mixed, 2)
    yield Odd("png RGB 16, Display P3", png(rgb * 257, 16, 2, [icc(P3_PROFILE)]), from_p3(rgb), 2)
    colors = (b"PLTE", rgb.astype(np.uint8).tobytes())
    indices = np.arange(9 * 13).reshape(9, 13, 1)
    yield Odd("png palette, AdobeRGB", png(indices, 8, 3, [colors, icc(ADOBE_PROFILE)]), from_adobe(rgb), 2)
    levels = rgb[..., :1]
    shown = from_linear_grey(levels[..., 0])
    yield Odd("png grey, linear", png(levels, 8, 0, [icc(GREY_PROFILE)]), shown, 2)
    yield Odd("png grey, AdobeRGB's profile", png(levels, 8, 0, [icc(ADOBE_PROFILE)]), grey(levels[..., 0]))
    both = png(np.concatenate([levels, alpha], -1), 8, 4, [icc(GREY_PROFILE)])
    yield Odd("png LA, linear", both, over(shown, alpha[..., 0] / 255), 2)
    yield Odd("png, profile not deflated", png(rgb, 8, 2, [(b"iCCP", b"x\0\0" + ADOBE_PROFILE)]), rgb)


def animations() -> Iterator[Odd]:
    """The first of several frames; frames smaller than the canvas."""
    frames = [quarters(), 255 - quarters()]
    rest = [Image.fromarray(frames[1])]
    for kind, options in (("webp", {"lossless": True}), ("png", {}), ("gif", {}), ("tiff", {})):
        yield Odd(
            f"{kind} of two frames", saved(frames[0], kind, save_all=True, append_images=rest, **options), frames[0]
        )
    palette = noise(21, 128, 3)
    frame = noise(22, 8, 12, top=127)
    shown, named = palette[frame].astype(float), [tuple(color) for color in palette.tolist()]
    yield Odd("gif", gif((12, 8), named, frame), shown)
    yield Odd("gif with a clear colour", gif((12, 8), named, frame, transparent=5), over(shown, (frame != 5) * 1.0))
    canvas, covered = np.zeros((15, 20, 3)), np.zeros((15, 20))
    canvas[4:12, 3:15], covered[4:12, 3:15] = shown, 1
    yield Odd("gif of a part of the canvas", gif((20, 15), named, frame, (3, 4)), over(canvas, covered))
    covered[4:12, 3:15] = frame != 5
    yield Odd("gif, part and clear colour", gif((20, 15), named, frame, (3, 4), 5), over(canvas, covered))


def sound_images() -> list[Odd]:
    """All kinds whose pixels are known."""
    return [*oriented(), *pngs(), *jpegs(), *profiles(), *animations(), *tiffs(), *bmps()]
