"""Stage fetch: photographs to folders of captioned crops, split by photograph, the same bytes on every machine.

Writes <output>/data/<resolution>/{all,quarter,held-out}, each with metadata.jsonl, and <output>/data/data.json.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from benchmarks.quality.photographs import SMALLEST, Photograph, listed_photographs, own_photographs, sha256
from lpl.data.files import write_atomically
from lpl.data.sources.base import digest
from lpl.diffusion.draws import keyed_uniform
from lpl.errors import UserError
from lpl.evaluation.evaluate import FEWEST

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
HELD_OUT, QUARTER = 0.4, 0.25
CLOSEST = 0.25
"""Side of the smallest crop, of the photograph's shorter side."""
MIN_OPAQUE = 0.35
"""Share of a crop that shows the photograph; of 20 draws without, the best is taken."""


class Counts(NamedTuple):
    """Crops of each photograph."""

    train: int = 20
    held_out: int = 20


def fetch(
    folder: Path, resolutions: list[int], *, images: Path | None = None, stamps: Path | None = None,
    demo_only: bool = False, counts: Counts = Counts(),  # noqa: B008 (immutable)
) -> None:  # fmt: skip
    """Makes the data, once: what is there already is compared, and refused if it would be other data.

    Args:
        folder: gets data/ and, where the stamps are downloaded, stamps/.
        resolutions: of the crops, none above 96.
        images: photographs of your own, used instead of the others.
        stamps: the stamps' folder, where the package is unpacked already; None: apt-get downloads it.
        demo_only: only the photographs of lpl.demo; nothing is downloaded.
        counts: crops of each photograph.

    Raises:
        UserError: a file with another checksum, no apt-get, too few photographs, or other data in the folder.
    """
    if images is not None:
        photographs = own_photographs(images)
        check_enough(images, photographs, counts)
    else:
        photographs = listed_photographs(None if demo_only else stamps or download_stamps(folder / "stamps"))
    plan = {
        "resolutions": resolutions,
        "counts": counts._asdict(),
        "photographs": [
            {"name": p.name, "sha256": sha256(p.file), "subject": p.subject, "parts": parts_of(p.name)}
            for p in photographs
        ],
    }
    data = folder / "data"
    written = data / "data.json"
    if written.is_file():
        if json.loads(written.read_text(encoding="utf-8")) != plan:
            raise UserError(f"{written}: describes other data; choose another --output_dir")
        return
    if max(resolutions) > SMALLEST:
        raise UserError(f"resolution {max(resolutions)}: no crop is enlarged, so at most {SMALLEST}")
    shutil.rmtree(data, ignore_errors=True)
    rows: dict[Path, list[str]] = {}
    stems = stems_of([p.name for p in photographs])
    for photograph in photographs:
        parts = parts_of(photograph.name)
        number = counts.held_out if parts == ["held-out"] else counts.train
        for index, (image, caption) in enumerate(crops(photograph, number)):
            name = f"{stems[photograph.name]}_{index:02}.png"
            for size in resolutions:
                for part in parts:
                    target = data / str(size) / part
                    target.mkdir(parents=True, exist_ok=True)
                    image.resize((size, size), Image.Resampling.LANCZOS).save(target / name)
                    row = {"file_name": name, "text": caption, "photograph": photograph.name}
                    rows.setdefault(target, []).append(json.dumps(row, ensure_ascii=False))
    for target, lines in rows.items():
        write_atomically(target / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    write_atomically(written, (json.dumps(plan, indent=1, ensure_ascii=False) + "\n").encode())


def check_enough(folder: Path, photographs: list[Photograph], counts: Counts) -> None:
    """Checks that own photographs can be trained on and measured with.

    Raises:
        UserError: too few of them fall into one of the parts.
    """
    found = Counter(part for p in photographs for part in parts_of(p.name))
    # the floor halves the held-out ones by photograph
    needed = {"held-out": max(2, math.ceil(FEWEST["frechet"] / counts.held_out)), "all": 1, "quarter": 1}
    if any(found[part] < number for part, number in needed.items()):
        raise UserError(
            f"--images {folder}: {len(photographs)} photographs are too few: by a hash of their names "
            f"{found['held-out']} are held out, {found['all']} trained on and {found['quarter']} of those in the "
            f"smaller set; needed are {', '.join(map(str, needed.values()))}: add more"
        )


def stems_of(names: list[str]) -> dict[str, str]:
    """What the crops' files of each photograph begin with; where several would be called the same, with a hash."""
    stems = {name: name.replace("/", "_").rsplit(".", 1)[0] for name in names}
    times = Counter(stems.values())
    return {name: stem if times[stem] == 1 else f"{stem}-{digest(name)[:8]}" for name, stem in stems.items()}


def parts_of(name: str) -> list[str]:
    """The folders that crops of a photograph belong to, by a hash of its name."""
    if keyed_uniform("quality held-out", name) < HELD_OUT:
        return ["held-out"]
    return ["all", "quarter"] if keyed_uniform("quality quarter", name) < QUARTER else ["all"]


def crops(photograph: Photograph, number: int) -> list[tuple[Image.Image, str]]:
    """Square crops of a photograph, not yet resized, and their captions in the words of lpl.demo."""
    image, opaque = photograph.load()
    rng = random.Random(f"quality {photograph.name}")
    shorter = min(image.size)
    found = []
    for _ in range(number):
        best: tuple[float, tuple[int, int, int, int]] | None = None
        for _ in range(20):
            side = min(shorter, max(SMALLEST, round(shorter * rng.uniform(CLOSEST, 1.0))))
            left, upper = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            box = (left, upper, left + side, upper + side)
            shown = sum(v * n for v, n in enumerate(opaque.crop(box).histogram())) / (255 * side * side)
            if best is None or shown > best[0]:
                best = (shown, box)
            if shown >= MIN_OPAQUE:
                break
        assert best is not None
        box = best[1]
        found.append((image.crop(box), caption_of(photograph.subject, box, image.size)))
    return found


def caption_of(subject: str, box: tuple[int, int, int, int], size: tuple[int, int]) -> str:
    """For example "a close-up photo of a frog, upper left"."""
    share = (box[2] - box[0]) / min(size)
    kind = "wide photo" if share > 0.7 else "photo" if share > 0.45 else "close-up photo"
    column = min(3 * (box[0] + box[2]) // (2 * size[0]), 2)
    row = min(3 * (box[1] + box[3]) // (2 * size[1]), 2)
    place = f"{('upper', '', 'lower')[row]} {('left', 'centre', 'right')[column]}".strip()
    return f"a {kind} of {subject}, {place}"


def download_stamps(folder: Path) -> Path:
    """The stamps' folder, downloaded with apt-get and unpacked (not installed) where it is not there yet.

    Raises:
        UserError: it cannot be downloaded.
    """
    found = folder / STAMPS
    if (folder / "unpacked").is_file():
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{PACKAGE} cannot be fetched with apt-get ({error}): unpack Debian's package elsewhere and give its "
            f"{STAMPS} as --stamps, or give photographs of your own as --images"
        ) from error
    package.unlink()
    (folder / "unpacked").touch()
    return found
