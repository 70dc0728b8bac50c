"""A folder of image files. Listing it reads metadata.jsonl files, but no image and no caption file.

Differs from datasets' own image folder: an image without a caption is refused, as is a caption without an image.
"""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from lpl.config import require
from lpl.data.sources.base import IMAGE_SUFFIXES, PIECE_SIZE, Piece, Sample, digest, one_line, read_file
from lpl.data.sources.metadata import read_metadata
from lpl.errors import UserError

_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_GONE = "gone"


class Files(NamedTuple):
    """What listing learns of an image: size and time of change of the file, and of the .txt beside it, if any."""

    image: str
    text: str | None


class Entry(NamedTuple):
    """An image of the folder; captions of None are in its .txt file."""

    id: str
    stamp: str
    captions: tuple[str, ...] | None


class FolderSource:
    """A folder of images, nested as deep as one likes, in the order of their paths.

    Captions come from `metadata.jsonl` files (one in any folder; `file_name` is relative to it; a list holds several
    captions of one image) or else from a .txt file beside the image, which holds one caption. A sample's id is its path
    relative to the folder, with /. Hidden files and folders are left out; links to folders are followed, but no folder
    is listed twice.

    Args:
        folder: the folder.
        caption_column: key of the captions in metadata.jsonl.
        max_samples: use only the first so many images.
        flag: what named the folder.

    Raises:
        UserError: no folder, no images, an image without caption, or a faulty metadata.jsonl.
    """

    def __init__(
        self, folder: str, caption_column: str = "text", max_samples: int | None = None, flag: str = "--train_data_dir"
    ) -> None:
        root = os.path.expanduser(folder)
        self.name = f"{flag} {root}"
        self.identity = f"folder {os.path.abspath(root)} {caption_column}"
        instead = ", or name a data set with --dataset_name" if flag == "--train_data_dir" else ""
        require(
            os.path.isdir(root),
            f"{self.name}: {'not a folder' if os.path.exists(root) else 'no such folder'}: give an image "
            f"folder{instead}",
        )
        entries = self._entries(root, caption_column, max_samples)
        self.size: int | None = len(entries)
        self._pieces = [
            FolderPiece(root, str(start // PIECE_SIZE), entries[start : start + PIECE_SIZE])
            for start in range(0, len(entries), PIECE_SIZE)
        ]

    def pieces(self) -> Sequence[Piece]:
        """Slices of the sorted paths."""
        return self._pieces

    def _entries(self, root: str, caption_column: str, max_samples: int | None) -> list[Entry]:
        files, metadata = list_images(root)

        def exists(image: str) -> bool:
            if image not in files:
                status = _status(os.path.join(root, image))
                if status is None or not stat.S_ISREG(status.st_mode):
                    return False
                files[image] = Files(_stamp(status), None)
            return True

        captions = read_metadata(root, metadata, caption_column, exists)
        images = sorted(files)[:max_samples]
        require(bool(images), f"{self.name}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
        missing = [name for name in images if name not in captions and files[name].text is None]
        require(
            not missing,
            f"{self.name}: {len(missing)} of {len(images)} images have no caption, first "
            f"{missing[0] if missing else ''}: list them in metadata.jsonl, or put a .txt of the same name beside each",
        )
        entries = []
        for name in images:
            own = captions.get(name)
            second = files[name].text if own is None else digest(*own)
            entries.append(Entry(name, f"{files[name].image} {second}", own))
        return entries


class FolderPiece:
    """A slice of a folder's images."""

    def __init__(self, root: str, key: str, entries: Sequence[Entry]) -> None:
        self._root, self._entries = root, entries
        self.key = key
        self.stamp = digest(*(part for entry in entries for part in (entry.id, entry.stamp)))
        self.size: int | None = len(entries)

    def samples(self) -> Generator[Sample, None, None]:
        """The images with their captions; a .txt file is read when its image's turn comes."""
        for entry in self._entries:
            path = os.path.join(self._root, entry.id)
            captions = entry.captions or (_read_caption(os.path.splitext(path)[0] + ".txt"),)
            yield Sample(entry.id, captions, os.path.dirname(entry.id), entry.stamp, path, partial(read_file, path))


def list_images(root: str) -> tuple[dict[str, Files], list[str]]:
    """Images below a folder by relative path with /, and its metadata.jsonl files.

    Links to folders come after all else, so that a folder goes by its own path where that is below the root too.

    Raises:
        UserError: a folder that cannot be listed.
    """
    images: dict[str, Files] = {}
    metadata: list[str] = []
    seen: set[str] = set()
    folders = [("", os.path.realpath(root))]
    links: list[str] = []
    while folders or links:
        if folders:
            prefix, real = folders.pop()
        else:
            prefix = heapq.heappop(links)
            real = os.path.realpath(os.path.join(root, prefix))
        if real in seen:
            continue
        seen.add(real)
        found: list[tuple[str, str]] = []
        texts: dict[str, str] = {}
        for entry in _scan(os.path.join(root, prefix)):
            name = entry.name
            stem, suffix = os.path.splitext(name)
            if entry.is_dir(follow_symlinks=False):
                folders.append((f"{prefix}{name}/", os.path.join(real, name)))
            elif entry.is_symlink() and (status := _status(entry)) is not None and stat.S_ISDIR(status.st_mode):
                heapq.heappush(links, f"{prefix}{name}/")
            elif name == "metadata.jsonl":
                metadata.append(prefix + name)
            elif suffix == ".txt":
                status = _status(entry)
                if status is not None and stat.S_ISREG(status.st_mode):
                    texts[stem] = _stamp(status)
            elif suffix.lower() in _SUFFIXES:
                status = _status(entry)
                # A link to nothing stays in the list: reading it says what is wrong.
                if status is None or stat.S_ISREG(status.st_mode):
                    found.append((name, _stamp(status)))
        for name, stamp in found:
            images[prefix + name] = Files(stamp, texts.get(os.path.splitext(name)[0]))
    return images, sorted(metadata)


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


def _status(file: os.DirEntry[str] | str) -> os.stat_result | None:
    """Of what a link leads to; None where there is nothing."""
    try:
        return os.stat(file) if isinstance(file, str) else file.stat()
    except OSError:
        return None


def _stamp(status: os.stat_result | None) -> str:
    return _GONE if status is None else f"{status.st_size:x}.{status.st_mtime_ns:x}"


def _read_caption(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return one_line(file.read())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): correct its permissions or remove it") from None
