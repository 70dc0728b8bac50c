"""The pictures of the benchmark: photographs and drawings of Debian's packages, cleaned, named and split by content.

Photographs and drawn stamps of tuxpaint-stamps-default, clip art of openclipart-png (public domain), the emoji of
fonts-noto-color-emoji (OFL) and lpl.demo's photographs. A picture's caption has its kind, its subject in words that
other pictures share, and its folder: "clip art of red apple, fruit".
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lpl.demo.photographs import PHOTOGRAPHS, locate
from lpl.diffusion.draws import keyed_uniform

SIDE = 64
"""Pixels across of what is trained on; no picture smaller than this is taken."""
WORKING_SIZE = 320
HELD_OUT = 0.25
STAMPS, CLIP_ART, EMOJI = "tuxpaint-stamps-default", "openclipart-png", "fonts-noto-color-emoji"

CLIP_ART_FOLDERS = re.compile(
    r"^(animals|buildings|food|people|plants|recreation|tools|transportation|education|electronics|science"
    r"|containers|decorations|special/patterns|geography/astronomy)(/|$)"
)
LEFT_OUT = re.compile(
    r"games/cards|aiga-symbols|roadsigns|stickmen|chess|/symbols/|alphabet|numbers|sign_language|roadsigns|/flags/"
    r"|toys/dreidel|musical_notes|^symbols"
)
SIGNS = re.compile(
    r"\b(ARROW|SYMBOL|SQUARE|LETTER|CLOCK FACE|MODIFIER|KEYCAP|TRIANGLE|CIRCLE|MARK|ARIES|TAURUS|GEMINI|CANCER|LEO"
    r"|VIRGO|LIBRA|SCORPIUS|SAGITTARIUS|CAPRICORN|AQUARIUS|PISCES|ARROWS|IDEOGRAPH|INPUT|DIGIT|SUIT|BUTTON|SIGN|LOOP"
    r"|POINTING|DIAMOND|REGIONAL|DOUBLE|OPHIUCHUS|ALIEN MONSTER|NO|CJK|KATAKANA|SQUARED|CHECK|RECYCLING)\b"
)
EMOJI_FOLDERS = (
    (0x1F300, 0x1F32C, "weather"), (0x1F32D, 0x1F32F, "food"), (0x1F330, 0x1F344, "plants"),
    (0x1F345, 0x1F37F, "food"), (0x1F380, 0x1F3CF, "recreation"), (0x1F3D0, 0x1F3D3, "sports"),
    (0x1F3D4, 0x1F3F0, "buildings"), (0x1F3F8, 0x1F3FA, "sports"), (0x1F400, 0x1F43F, "animals"),
    (0x1F440, 0x1F450, "body"), (0x1F451, 0x1F463, "clothing"), (0x1F464, 0x1F487, "people"),
    (0x1F488, 0x1F4FF, "objects"), (0x1F500, 0x1F5FA, "objects"), (0x1F600, 0x1F644, "faces"),
    (0x1F645, 0x1F64F, "people"), (0x1F680, 0x1F6A4, "vehicles"), (0x1F6A5, 0x1F6FF, "objects"),
    (0x1F90C, 0x1F91F, "body"), (0x1F920, 0x1F92F, "faces"), (0x1F930, 0x1F939, "people"),
    (0x1F93A, 0x1F94F, "sports"), (0x1F950, 0x1F96F, "food"), (0x1F970, 0x1F97A, "faces"),
    (0x1F97B, 0x1F97F, "clothing"), (0x1F980, 0x1F9AE, "animals"), (0x1F9B4, 0x1F9C0, "body"),
    (0x1F9C1, 0x1F9CB, "food"), (0x1F9CC, 0x1F9DF, "people"), (0x1F9E0, 0x1F9FF, "objects"),
    (0x1FA70, 0x1FA7C, "clothing"), (0x1FA80, 0x1FAAC, "objects"), (0x1FAB0, 0x1FAB3, "animals"),
    (0x1FAB4, 0x1FABB, "plants"), (0x1FABD, 0x1FACF, "animals"), (0x1FAD0, 0x1FADF, "food"),
    (0x1FAE0, 0x1FAEF, "faces"), (0x1FAF0, 0x1FAFF, "body"),
)  # fmt: skip
"""Of ranges of code points what they show: the names alone seldom say it."""
PHOTOGRAPHED_COLORS, PHOTOGRAPHED_FLAT = 0.05, 0.6
"""A photographed stamp has at least so many colours a pixel, and at most this share of pixels like their neighbour."""
MIN_COVERED, MIN_COLORS = 0.12, 24
"""Of the square a picture is laid on: the least share that is not white, and the least number of (5-bit) colours."""
ALIKE = 14.0
"""Two pictures whose thumbnails (16 x 16, RGB) are nearer than this (root mean square, of 255) are one."""


@dataclass(frozen=True)
class Picture:
    """A picture, cleaned.

    Attributes:
        name: unique, says where it is from.
        kind: "photo", "drawing", "clip art" or "emoji".
        words: lower-case words of its own name.
        folder: what kind of thing it shows, such as "fruit"; may be empty.
        image: RGB, square, on white where it was transparent, at most WORKING_SIZE across.
        whole: whether only the whole picture is one of its kind (an emoji), or parts of it as well (a photograph).
    """

    name: str
    kind: str
    words: tuple[str, ...]
    folder: str
    image: Image.Image
    whole: bool

    def view(self, rng: random.Random) -> tuple[Image.Image, float]:
        """A square part, SIDE across, and how large it is: three to ten tenths of a photograph, seven of the others."""
        share = rng.uniform(0.7, 1.0) if self.whole else rng.uniform(0.35, 1.0)
        side = max(min(SIDE, self.image.width), round(share * self.image.width))
        left, upper = (rng.randint(0, self.image.width - side) for _ in range(2))
        part = self.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, upper, left + side, upper + side))
        return part, share

    @property
    def held_out(self) -> bool:
        """Whether it is held out, by a hash of its name; lpl.demo's own photographs never are."""
        return not self.name.startswith("demo/") and keyed_uniform("quality pictures held-out", self.name) < HELD_OUT


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words of at least three letters, without numbers."""
    return tuple(word for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2)


def laid_on_white(image: Image.Image) -> Image.Image:
    """A picture upright on a white square, its empty border cut to a twentieth, at most WORKING_SIZE across."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    flat = white.convert("RGB")
    box = ImageOps.invert(flat).point([0 if value < 12 else 255 for value in range(256)] * 3).getbbox()
    flat = flat.crop(box or (0, 0, 1, 1))
    scale = min(1.0, WORKING_SIZE / max(flat.size))
    flat = flat.resize([max(1, round(side * scale)) for side in flat.size], Image.Resampling.LANCZOS)
    side = round(max(flat.size) * (1.0 if min(flat.size) >= 0.9 * max(flat.size) else 1.1))
    square = Image.new("RGB", (side, side), "white")
    square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    return square


def is_colourful(image: Image.Image) -> bool:
    """Whether a picture covers enough of its square and has more than a few colours: no icon, outline or silhouette."""
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)).astype(int)
    covered = (small.min(axis=2) < 240).mean()
    colors = np.unique((small[..., 0] >> 3) << 10 | (small[..., 1] >> 3) << 5 | small[..., 2] >> 3)
    saturated = (small.max(axis=2) - small.min(axis=2)).mean()
    return bool(covered >= MIN_COVERED and len(colors) >= MIN_COLORS and (saturated > 4 or len(colors) > 120))


def is_photographed(file: Path) -> bool:
    """Whether a stamp is a photograph: many colours, few flat areas."""
    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGBA")).astype(np.int64)
    opaque = pixels[..., 3] > 250
    color = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    beside = opaque[:, 1:] & opaque[:, :-1]
    flat = (beside & (color[:, 1:] == color[:, :-1])).sum() / max(1, beside.sum())
    colors = len(np.unique(color[opaque])) / max(1, opaque.sum())
    return bool(opaque.any()) and colors >= PHOTOGRAPHED_COLORS and flat <= PHOTOGRAPHED_FLAT


def stamps(root: Path) -> Iterator[Picture]:
    """Of Tux Paint's stamps those with a description that are neither letters nor signs."""
    folder = root / "usr/share/tuxpaint/stamps"
    for file in sorted(folder.rglob("*.png")):
        name, text = file.relative_to(folder), file.with_suffix(".txt")
        if LEFT_OUT.search(name.as_posix()) or not text.is_file():
            continue
        with Image.open(file) as opened:
            if max(opened.size) < SIDE:
                continue
            image = laid_on_white(opened)
        first = text.read_text(encoding="utf-8").split("\n")[0]
        subject = re.split(r"[.,;:(!?]| is | are | was ", first, maxsplit=1)[0]
        photographed = is_photographed(file)
        yield Picture(
            f"stamps/{name.as_posix()}", "photo" if photographed else "drawing", words_of(subject),
            name.parent.name.replace("_", " ").lower(), image, not photographed,
        )  # fmt: skip


def clip_art(root: Path) -> Iterator[Picture]:
    """Of the Open Clip Art Library what shows things: no shapes, icons, flags, signs and cards."""
    folder = root / "usr/share/openclipart/png"
    for file in sorted(folder.rglob("*.png")):
        name = file.relative_to(folder)
        if not CLIP_ART_FOLDERS.search(name.parent.as_posix()) or LEFT_OUT.search(name.as_posix()):
            continue
        with Image.open(file) as opened:
            if not SIDE <= max(opened.size) <= 6000 or min(opened.size) * 4 < max(opened.size):
                continue
            opened.thumbnail((2 * WORKING_SIZE, 2 * WORKING_SIZE))
            image = laid_on_white(opened)
        yield Picture(
            f"clip-art/{name.as_posix()}", "clip art", words_of(file.stem), name.parent.name.replace("_", " "), image,
            True,
        )  # fmt: skip


def emoji(root: Path) -> Iterator[Picture]:
    """Of Noto's emoji those of one character that show things and have a name: no letters, arrows and signs."""
    font = ImageFont.truetype(str(next((root / "usr/share/fonts").rglob("NotoColorEmoji.ttf"))), 109)

    def drawn(character: str) -> Image.Image:
        image = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
        ImageDraw.Draw(image).text((10, 10), character, font=font, embedded_color=True)
        return image

    missing = drawn("\u0378").tobytes()
    folders = [(range(first, last + 1), folder) for first, last, folder in EMOJI_FOLDERS]
    for code in [*range(0x2600, 0x27C0), *range(0x1F300, 0x1FB00)]:
        name = unicodedata.name(chr(code), "")
        if not name or SIGNS.search(name):
            continue
        image = drawn(chr(code))
        if image.getbbox() is None or image.tobytes() == missing:
            continue
        folder = next((folder for codes, folder in folders if code in codes), "")
        yield Picture(f"emoji/{code:05x}", "emoji", words_of(name), folder, laid_on_white(image), True)


def demo() -> Iterator[Picture]:
    """The photographs of lpl.demo, all of them trained on: its pretrained VAE has seen them."""
    for photograph in PHOTOGRAPHS:
        with Image.open(locate(photograph)) as opened:
            image = opened.convert("RGB")
        side = min(image.size)
        box = ((image.width - side) // 2, (image.height - side) // 2)
        square = image.crop((*box, box[0] + side, box[1] + side)).resize((WORKING_SIZE, WORKING_SIZE))
        yield Picture(f"demo/{photograph.name}", "photo", words_of(photograph.subject), "", square, False)


def thumbnail(image: Image.Image) -> np.ndarray:
    """What near-duplicates are found by: 16 x 16 x 3 values of 0 to 255, flattened."""
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).reshape(-1)


def without_doubles(pictures: list[Picture]) -> list[Picture]:
    """The pictures without those that are nearly another, or its mirror image: the first of each stays."""
    kept: list[Picture] = []
    seen = np.empty((0, 768), dtype=np.float32)
    for picture in pictures:
        views = [thumbnail(picture.image), thumbnail(ImageOps.mirror(picture.image))]
        if len(seen) and min(np.sqrt(((seen - view) ** 2).mean(axis=1)).min() for view in views) < ALIKE:
            continue
        kept.append(picture)
        seen = np.concatenate([seen, views[0][None]])
    return kept


def vocabulary(pictures: list[Picture]) -> set[str]:
    """Words that captions may have: an English word that at least two training pictures share.

    A clip art's file name also has its author's name, so a word has to occur in an emoji's name, in a stamp's
    description or as a folder as well.
    """
    english = {word for p in pictures if p.kind != "clip art" for word in p.words}
    english |= {word for p in pictures for word in words_of(p.folder)}
    counts: dict[str, int] = {}
    for picture in pictures:
        if not picture.held_out:
            for word in {*picture.words, *words_of(picture.folder)}:
                counts[word] = counts.get(word, 0) + 1
    return {word for word, count in counts.items() if count >= 2 and word in english} - {"with", "and", "the", "for"}


def caption(picture: Picture, known: set[str], share: float = 1.0) -> str:
    """For example "clip art of red apple, fruit"; at most four words of the name; "close-up" of small parts.

    Args:
        picture: what is captioned.
        known: words that it may have.
        share: of the picture's side, what is seen of it.
    """
    words = list(dict.fromkeys(word for word in picture.words if word in known))[:4]
    folder = " ".join(word for word in words_of(picture.folder) if word in known and word not in words)
    subject = " ".join(words)
    kind = f"close-up {picture.kind}" if share < 0.6 else picture.kind
    return ", ".join(part for part in (f"{kind} of {subject}" if subject else kind, folder) if part)


def selected(root: Path) -> list[Picture]:
    """All pictures of the unpacked packages: cleaned, without near-duplicates, ordered by name.

    Args:
        root: where the three packages are unpacked.
    """
    found = [*demo(), *stamps(root), *clip_art(root), *emoji(root)]
    return without_doubles([p for p in found if p.kind == "photo" or is_colourful(p.image)])
