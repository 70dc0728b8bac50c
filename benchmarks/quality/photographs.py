"""The benchmark's photographs: Debian's tuxpaint-stamps-default, those of lpl.demo, and anyone's own.

What is used of the first two is listed with checksums in photographs.sha256, which `--select` writes anew.

    python -m benchmarks.quality.photographs --select STAMPS    # STAMPS: the unpacked usr/share/tuxpaint/stamps
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lpl.data.decode import DECODE_ERRORS
from lpl.data.files import write_atomically
from lpl.data.sources.base import IMAGE_SUFFIXES
from lpl.demo.photographs import PHOTOGRAPHS, WORKING_SIZE, locate
from lpl.errors import UserError

SUMS = Path(__file__).parent / "photographs.sha256"
SMALLEST = 96
"""Pixels across, of a stamp's longer side, below which a photograph is left out: no crop is ever enlarged."""
MIN_COLORS, MAX_FLAT = 0.05, 0.6
"""A photograph has at least so many colours a pixel, and at most this share of pixels equal to their neighbour."""
DRAWN = re.compile(
    r"cartoon|^symbols/|/flags/|/roadsigns/|/toys/|/easter/|/hanukkah/|mirror"
    r"|clothes/button|Santa|stocking|confetti|jackolantern|andy_cane|sedan_police|firework|explosion"
)
"""Drawings that the figures above do not tell from photographs."""
ARTICLES = ("A ", "An ", "The ", "a ", "an ", "the ")
"""What a stamp's subject begins with; the other texts are sentences: "Remember to flush the toilet!"."""
SUBJECT_LENGTH = 26
"""Characters of a subject in a caption: the demo's tokenizer writes words it does not know in bytes, 32 in all."""


@dataclass(frozen=True)
class Photograph:
    """One photograph: a name that says where it is from, its file, and what it shows."""

    name: str
    file: Path
    subject: str

    def load(self) -> tuple[Image.Image, Image.Image]:
        """Upright (RGB; what is transparent on a white square), and where it is opaque (L); at most 640 pixels."""
        with Image.open(self.file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
        scale = WORKING_SIZE / max(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        opaque = image.getchannel("A")
        if opaque.getextrema()[0] > 250:  # a whole picture: nothing to lay on white
            return image.convert("RGB"), opaque
        side = max(image.size)
        at = ((side - image.width) // 2, (side - image.height) // 2)
        canvas, mask = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
        canvas.paste(image, at, image)
        mask.paste(opaque, at)
        return canvas, mask


def subject_of(text: str) -> str:
    """What a description's first sentence names: "An African elephant." gives "an African elephant"."""
    words = re.split(r"[.,;:(!?]| is | are | was ", text.strip(), maxsplit=1)[0].split()
    if words and f"{words[0]} " in ARTICLES:
        words[0] = words[0].lower()
    while len(words) > 1 and len(" ".join(words)) > SUBJECT_LENGTH:
        words.pop()
    return " ".join(words)[:SUBJECT_LENGTH]


def listed_photographs(stamps: Path | None) -> list[Photograph]:
    """The photographs of photographs.sha256, every byte checked; without stamps only lpl.demo's.

    Raises:
        UserError: a file that is missing or another than the one listed.
    """
    shipped, found = {p.name: p for p in PHOTOGRAPHS}, []
    for line in SUMS.read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        origin, rest = name.split("/", 1)
        if origin == "demo":
            photograph = Photograph(name, locate(shipped[rest]), shipped[rest].subject)
        elif stamps is None:
            continue
        else:
            file = stamps / rest
            if not file.is_file():
                raise UserError(f"--stamps {stamps}: {rest} is missing")
            photograph = Photograph(name, file, _described(file, ARTICLES))
        if sha256(photograph.file) != digest:
            raise UserError(f"{photograph.file}: is another file than the one in {SUMS.name}; see --select there")
        found.append(photograph)
    return found


def own_photographs(folder: Path) -> list[Photograph]:
    """Images of a folder and its subfolders; the subject is in a .txt beside each, or else is the file's name.

    Those that cannot be read are left out and named.

    Raises:
        UserError: no images there that can be read and are large enough.
    """
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        photograph = Photograph(f"own/{file.relative_to(folder).as_posix()}", file, _described(file))
        try:
            image, _ = photograph.load()
        except DECODE_ERRORS as error:
            print(f"--images: {file} is left out, as it cannot be read ({' '.join(str(error).split())})")
            continue
        if min(image.size) >= SMALLEST:
            found.append(photograph)
    if not found:
        raise UserError(f"--images {folder}: no images in it that can be read and are {SMALLEST} pixels across")
    return found


def _described(file: Path, begins: str | tuple[str, ...] = "") -> str:
    """The subject by the .txt beside a file, if its first line begins so, or else by the file's name."""
    text = file.with_suffix(".txt")
    if text.is_file():
        line = text.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0]
        if line.startswith(begins) and (subject := subject_of(line)):
            return subject
    return subject_of(re.sub(r"[-_]+", " ", file.stem))


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_photograph(file: Path, name: str) -> bool:
    """Whether a stamp is large enough, described, and looks photographed: many colours, few flat areas."""
    if DRAWN.search(name) or not file.with_suffix(".txt").is_file():
        return False
    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGBA")).astype(np.int64)
    if max(pixels.shape[:2]) < SMALLEST:
        return False
    opaque = pixels[..., 3] > 250
    color = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    beside = opaque[:, 1:] & opaque[:, :-1]
    flat = (beside & (color[:, 1:] == color[:, :-1])).sum() / max(1, beside.sum())
    return bool(opaque.any()) and len(np.unique(color[opaque])) / opaque.sum() >= MIN_COLORS and flat <= MAX_FLAT


def select(stamps: Path) -> None:
    """Writes photographs.sha256."""
    lines = [f"{sha256(locate(p))}  demo/{p.name}" for p in PHOTOGRAPHS]
    for file in sorted(stamps.rglob("*.png")):
        name = file.relative_to(stamps).as_posix()
        if is_photograph(file, name):
            lines.append(f"{sha256(file)}  stamps/{name}")
    write_atomically(SUMS, ("\n".join(lines) + "\n").encode())
    print(f"{len(lines)} photographs in {SUMS}")


if __name__ == "__main__":
    select(Path(sys.argv[sys.argv.index("--select") + 1]))
