"""What a folder holds, by the names of its files alone: images, the captions beside them, and what is left over."""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lpl.base.errors import UserError
from lpl.base.files import GONE, probe, stamp_of, status_of
from lpl.base.terminal import progress
from lpl.data.sources.base import IMAGE_SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of caption files; the first that exists counts. kohya's default is the second."""
PICTURE_SUFFIXES = frozenset(
    (
        ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".psd", ".svg", ".ico", ".tga",
        ".dds", ".exr", ".hdr", ".pbm", ".pgm", ".ppm", ".pnm", ".qoi", ".pcx", ".raw", ".dng", ".cr2", ".cr3", ".crw",
        ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".mp4", ".mov", ".webm", ".mkv", ".avi",
    )
)  # fmt: skip
"""Endings of pictures, and of films, that are not read."""
TABLES = frozenset(("metadata.csv", "metadata.parquet"))
_SUFFIXES = frozenset(IMAGE_SUFFIXES)


class Listing(NamedTuple):
    """The files below a folder, by relative path with /."""

    images: dict[str, str]
    """For each image the size and time of change of the file, and a hash if another file has the same ones; after a
    space the same for the caption file beside it, if any; after another its ending, if that is not `.txt`."""
    metadata: list[str]
    """The metadata.jsonl files."""
    folders: dict[str, str]
    """The prefix of the names in each folder, by its real path."""
    unread: list[str]
    """Pictures, and other files with a caption, whose endings are not read."""
    orphans: list[str]
    """Caption files without an image or such a file."""
    doubled: list[str]
    """Caption files of images that already have another."""
    tables: list[str]
    """Lists of captions that other programs read."""


def list_images(root: str) -> Listing:
    """The files below a folder; hidden ones are left out. A folder is listed by its own path, not by a link to it.

    Raises:
        UserError: a folder that cannot be listed, or a name that is not UTF-8.
    """
    found = Listing({}, [], {}, [], [], [], [])
    folders = [("", os.path.realpath(root))]
    links: list[str] = []
    show = os.environ.get("LOCAL_RANK", "0") == "0"
    bar = progress(desc="listing", unit="file", show=show)
    while folders or links:
        if folders:
            prefix, real = folders.pop()
        else:
            prefix = heapq.heappop(links)
            real = os.path.realpath(os.path.join(root, prefix))
        if real in found.folders:
            continue
        found.folders[real] = prefix
        images: dict[str, str] = {}
        texts: dict[str, str] = {}
        others: list[str] = []
        for entry in _scan(os.path.join(root, prefix)):
            name = entry.name
            suffix = _suffix(name)
            if entry.is_dir(follow_symlinks=False):
                folders.append((f"{prefix}{name}/", os.path.join(real, name)))
            elif entry.is_symlink() and (status := status_of(entry)) is not None and stat.S_ISDIR(status.st_mode):
                heapq.heappush(links, f"{prefix}{name}/")
            elif name == "metadata.jsonl":
                found.metadata.append(prefix + name)
            elif suffix in CAPTION_SUFFIXES:
                status = status_of(entry)
                if status is not None and stat.S_ISREG(status.st_mode):
                    texts[name] = stamp_of(status)
            elif suffix in _SUFFIXES:
                _require_utf8(root, prefix, name)
                status = status_of(entry)
                # A link to nothing stays in the list: reading it says what is wrong.
                if status is None or stat.S_ISREG(status.st_mode):
                    images[name] = stamp_of(status)
            else:
                others.append(name)
        bar.update(len(images) + len(texts))
        _match(found, prefix, images, texts, others)
    bar.close()
    found.metadata.sort()
    _tell_apart(root, found.images, show)
    return found


def _tell_apart(root: str, images: dict[str, str], show: bool) -> None:
    """Adds a hash of their content to the stamps of files that have the size and the time of change of another.

    Archives and copies give many files the same time: two of the same size could otherwise change places unnoticed.
    """
    seen: set[str] = set()
    twins: set[str] = set()
    for stamp in images.values():
        for part in stamp.split(" ")[:2]:
            (twins if part in seen else seen).add(part)
    alike = [name for name, stamp in images.items() if not twins.isdisjoint(stamp.split(" ")[:2])] if twins else []
    for name in progress(alike, desc="telling alike files apart", unit="file", show=show):
        parts = images[name].split(" ")
        text = os.path.splitext(name)[0] + (parts[2] if len(parts) > 2 else ".txt")
        for place, file in enumerate((name, text)[: len(parts)]):
            if parts[place] in twins and parts[place] != GONE:
                try:
                    parts[place] += f".{probe(os.path.join(root, file))}"
                except OSError:
                    continue  # reading it says what is wrong
        images[name] = " ".join(parts)


def _match(found: Listing, prefix: str, images: dict[str, str], texts: dict[str, str], others: list[str]) -> None:
    """Adds the files of a folder, each image with its caption file: of x.png it is x.txt, x.caption or x.png.txt."""
    written = {_plain(text): text for text in texts if _plain(text) != text}  # x.TXT

    def beside(name: str) -> list[str]:
        stem = name.removesuffix("." + name.rpartition(".")[2])
        plain = (part + suffix for part in dict.fromkeys((stem, name)) for suffix in CAPTION_SUFFIXES)
        return [text for p in plain if (text := p if p in texts else written.get(p)) is not None]

    used: set[str] = set()
    further: set[str] = set()
    for name, stamp in images.items():
        own = beside(name)
        found.images[prefix + name] = stamp
        if own:
            ending = own[0][len(name.rpartition(".")[0]) :]
            found.images[prefix + name] += f" {texts[own[0]]}" + ("" if ending == ".txt" else f" {ending}")
            used.add(own[0])
            further.update(own[1:])
    claimed: set[str] = set()
    for name in others:
        captions = [text for text in beside(name) if text not in used and text not in further]
        if captions or _suffix(name) in PICTURE_SUFFIXES:
            found.unread.append(prefix + name)
            claimed.update(captions)
        elif name in TABLES:
            found.tables.append(prefix + name)
    further -= used
    found.doubled.extend(sorted(prefix + text for text in further))
    if len(used) < len(texts):
        found.orphans.extend(sorted(prefix + text for text in texts.keys() - used - further - claimed))


def _plain(text: str) -> str:
    """The name of a caption file with its ending in small letters."""
    return text.removesuffix(text[text.rindex(".") :]) + _suffix(text)


def _suffix(name: str) -> str:
    """The ending of a file name with its dot, in small letters; "" if it has none."""
    _, dot, suffix = name.rpartition(".")
    return dot and dot + suffix.lower()


def _scan(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}): correct its permissions or move it elsewhere"
        ) from None


def _require_utf8(root: str, prefix: str, name: str) -> None:
    """A sample's id is a text: bytes that are not UTF-8 would fail much later."""
    try:
        name.encode()
    except UnicodeEncodeError:
        folder = os.path.join(root, prefix)
        raise UserError(f"{folder}: the file name {os.fsencode(name)!r} is not UTF-8: rename it") from None


def tell_left_out(listing: Listing, shadowed: Sequence[str] = ()) -> str:
    """What is left out of a folder; "" if nothing is. `shadowed`: images in metadata.jsonl with a caption file, too."""
    unread = sorted(name for name in listing.unread if name not in listing.images)
    endings = ", ".join(sorted({os.path.splitext(name)[1].lower() or "none" for name in unread})[:5])
    groups = (
        (unread, ("file is", "files are"), f"left out, as {endings} is not read: convert pictures to PNG or JPEG"),
        (listing.orphans, ("caption file is", "caption files are"), "not read, as no image beside has that name"),
        (
            [*listing.doubled, *shadowed],
            ("caption file is", "caption files are"),
            "not read, as the image has another caption",
        ),
        (listing.tables, ("table is", "tables are"), "not read: write it as metadata.jsonl"),
    )
    return "; ".join(_counted(names, nouns, why) for names, nouns, why in groups if names)


def _counted(names: Sequence[str], nouns: tuple[str, str], why: str) -> str:
    return f"{len(names):,} {nouns[len(names) > 1]} {why} ({'first ' if len(names) > 1 else ''}{names[0]})"
