"""Stage fetch: the packages, and captioned views of their pictures, the same bytes on every machine.

Writes <output>/packages, <output>/data/{train,same,held-out} with metadata.jsonl, and <output>/data/data.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

from benchmarks.quality.pictures import CLIP_ART, EMOJI, STAMPS, Picture, caption, selected, vocabulary
from lpl.base.errors import UserError
from lpl.base.files import write_atomically

PACKAGES = {
    STAMPS: ("2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"),
    CLIP_ART: ("1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"),
    EMOJI: ("2.042-0+deb12u1", "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751"),
}
"""Debian's packages with their version and SHA-256."""
VIEWS = {"train": (16, 5), "same": (6, 2), "held-out": (16, 7)}
"""Views of a photograph, of another picture. "same": further views of the training pictures, not trained on."""


def fetch(folder: Path, packages: Path | None = None, part: float = 1.0) -> None:
    """Makes the data, once.

    Args:
        folder: gets packages/ and data/.
        packages: where the packages are unpacked already; None: apt-get downloads them.
        part: share of the pictures that is used, for a toy run.

    Raises:
        UserError: a package that cannot be had, or is another one.
    """
    data, root = folder / "data", folder / "packages"
    if (data / "data.json").is_file():
        return
    if packages is None:
        for name in PACKAGES:
            unpack(name, root)
    elif not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        root.symlink_to(packages.resolve())
    shutil.rmtree(data, ignore_errors=True)
    pictures = selected(root)
    pictures = pictures[:: max(1, round(1 / part))]
    known = vocabulary(pictures)
    write_views(data / "train", [p for p in pictures if not p.held_out], known, *VIEWS["train"])
    write_views(data / "same", [p for p in pictures if not p.held_out], known, *VIEWS["same"])
    write_views(data / "held-out", [p for p in pictures if p.held_out], known, *VIEWS["held-out"])
    listed = [{"name": p.name, "kind": p.kind, "held_out": p.held_out, "caption": caption(p, known)} for p in pictures]
    write_atomically(data / "data.json", (json.dumps(listed, indent=0, ensure_ascii=False) + "\n").encode())


def few_packages(packages: Path, folder: Path) -> Path:
    """A folder for a toy run: of unpacked packages the stamps of animals and the emoji, as links."""
    for part, of in (("tuxpaint/stamps", "tuxpaint/stamps/animals"), ("fonts", "fonts")):
        link = folder / "usr" / "share" / part
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((packages / "usr" / "share" / of).resolve())
    return folder


def write_views(folder: Path, pictures: list[Picture], known: set[str], of_photograph: int, of_other: int) -> None:
    """Writes captioned views and their metadata.jsonl.

    Views of "same" are others than those of "train"; of small pictures a few coincide.
    """
    folder.mkdir(parents=True)
    rows = []
    for number, picture in enumerate(pictures):
        rng = random.Random(f"quality {folder.name} {picture.name}")
        for index in range(of_other if picture.whole else of_photograph):
            view, share = picture.view(rng)
            name = f"{number:04}_{index:02}.png"
            view.save(folder / name)
            rows.append({"file_name": name, "text": caption(picture, known, share), "picture": picture.name})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / "metadata.jsonl", text.encode())


def unpack(name: str, root: Path) -> None:
    """Downloads a package with apt-get and unpacks (does not install) it, where it is not there yet.

    Raises:
        UserError: it cannot be downloaded, or is another version.
    """
    version, digest = PACKAGES[name]
    done = root / f"{name}.unpacked"
    if done.is_file():
        return
    root.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=root, check=True, capture_output=True)
        (package,) = root.glob(f"{name}_*.deb")
        if hashlib.sha256(package.read_bytes()).hexdigest() != digest:
            raise UserError(f"{package}: is another file than the package of this name that was used")
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{name} {version} cannot be fetched with apt-get ({error}): unpack Debian's packages {', '.join(PACKAGES)}"
            " into a folder elsewhere and give it as --packages"
        ) from error
    package.unlink()
    done.touch()
