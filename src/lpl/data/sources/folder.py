"""A folder of image files. Listing it reads metadata.jsonl files, but no image and no caption file.

Differs from datasets' own image folder: an image without a caption is refused, as is a caption without an image.
"""

from __future__ import annotations

import heapq
import logging
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from functools import partial

from lpl.config import require
from lpl.data.sources.base import IMAGE_SUFFIXES, PIECE_SIZE, Piece, Sample, digest, one_line, read_file
from lpl.data.sources.mask_files import ENDING, beside, masks_beside, masks_in
from lpl.data.sources.metadata import read_metadata
from lpl.data.sources.versions import Versions
from lpl.errors import UserError
from lpl.progress import progress

_SUFFIXES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
_GONE = "gone"

logger = logging.getLogger("lpl")


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
        masks: samples have masks: x-masklabel.png beside x.jpg. Such files are no images of their own, masks or not.
        mask_dir: another folder, where masks have their images' relative paths; with masks.

    Raises:
        UserError: no folder, no images, an image without caption, a faulty metadata.jsonl, or a mask_dir without masks.
    """

    def __init__(
        self,
        folder: str,
        caption_column: str = "text",
        max_samples: int | None = None,
        flag: str = "--train_data_dir",
        *,
        masks: bool = False,
        mask_dir: str | None = None,
    ) -> None:
        root = os.path.expanduser(folder)
        self.name = f"{flag} {root}"
        self.identity, self.versions = f"folder {os.path.abspath(root)} {caption_column}", Versions()
        instead = ", or name a data set with --dataset_name" if flag == "--train_data_dir" else ""
        require(
            os.path.isdir(root),
            f"{self.name}: {'not a folder' if os.path.exists(root) else 'no such folder'}: give an image "
            f"folder{instead}",
        )
        self._flag, self._masks, self._mask_dir = (
            flag,
            masks,
            None if mask_dir is None else os.path.expanduser(mask_dir),
        )
        self._pieces = self._list(root, caption_column, max_samples)
        self.size: int | None = sum(piece.size or 0 for piece in self._pieces)

    def pieces(self) -> Sequence[Piece]:
        """Slices of the sorted paths."""
        return self._pieces

    def _list(self, root: str, caption_column: str, max_samples: int | None) -> list[FolderPiece]:
        files, metadata = list_images(root)

        def exists(image: str) -> bool:
            if image not in files:
                status = _status(os.path.join(root, image))
                if status is None or not stat.S_ISREG(status.st_mode):
                    return False
                files[image] = _stamp(status)
            return True

        captions = read_metadata(root, metadata, caption_column, exists)
        masks = {name: files.pop(name) for name in beside(files)}
        images = sorted(files)[:max_samples]
        require(bool(images), f"{self.name}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
        missing = [name for name in images if name not in captions and " " not in files[name]]
        require(
            not missing,
            f"{self.name}: {len(missing)} of {len(images)} images have no caption, first "
            f"{missing[0] if missing else ''}: list them in metadata.jsonl, or put a .txt of the same name beside each",
        )
        found = self._masks_of(root, images, masks)
        pieces = []
        for start in range(0, len(images), PIECE_SIZE):
            part = images[start : start + PIECE_SIZE]
            own = [captions.get(name) for name in part]
            # taken out, as memory would hold a large folder twice
            stamps = [_with_captions(files.pop(name), given) for name, given in zip(part, own, strict=True)]
            paths: list[str | None] | None = None
            if found is not None:
                paths = [path for path, _ in found[start : start + PIECE_SIZE]]
                pairs = zip(stamps, found[start : start + PIECE_SIZE], strict=True)
                stamps = [stamp if path is None else f"{stamp}|{mask}" for stamp, (path, mask) in pairs]
            pieces.append(FolderPiece(root, str(start // PIECE_SIZE), part, stamps, own, paths))
        return pieces

    def _masks_of(self, root: str, images: list[str], masks: dict[str, str]) -> list[tuple[str | None, str]] | None:
        """Path and stamp of each image's mask, None if it has none; None where masks are not in use."""
        if not self._masks:
            if masks:
                logger.warning(
                    "%s: %d files end in %s: they are masks, which only --masked_loss files uses",
                    *(self.name, len(masks), ENDING),
                )
            return None
        folder = self._mask_dir
        if folder is None:
            names = masks_beside(images, set(masks))
            require(
                any(names) or self._flag != "--train_data_dir",
                f"--masked_loss files: no image of {self.name} has a mask beside it: name them as the images, with "
                f"{ENDING} for their ending, or name another folder with --mask_dir",
            )
        else:
            require(
                os.path.isdir(folder), f"--mask_dir {folder}: no such folder: name the folder that the masks are in"
            )
            inside = os.path.realpath(folder) == os.path.realpath(root)
            require(
                not inside and not os.path.realpath(folder).startswith(os.path.join(os.path.realpath(root), "")),
                f"--mask_dir {folder} lies in {self.name}: its files would be taken for training images; move it out",
            )
            masks = list_images(folder)[0]
            names = masks_in(folder, images, masks)
        return [(None, "") if n is None else (os.path.join(folder or root, n), masks[n]) for n in names]


def _with_captions(stamp: str, captions: tuple[str, ...] | None) -> str:
    return stamp if captions is None else f"{stamp.partition(' ')[0]} {digest(*captions)}"


class FolderPiece:
    """A slice of a folder's images.

    Args:
        root: the folder.
        key: the piece's.
        images: relative to the root, with /.
        stamps: of each image with its captions.
        captions: of each image; None: they are in its .txt file.
        masks: path of each image's mask, None if it has none; None: masks are not in use.
    """

    def __init__(
        self,
        root: str,
        key: str,
        images: Sequence[str],
        stamps: Sequence[str],
        captions: Sequence[tuple[str, ...] | None],
        masks: Sequence[str | None] | None = None,
    ) -> None:
        self._root, self.key = root, key
        self.stamp = digest(*(part for pair in zip(images, stamps, strict=True) for part in pair))
        self.size: int | None = len(images)
        self._images, self._stamps = "\0".join(images), "\0".join(stamps)  # a fifth of the memory of as many strings
        self._captions = captions if any(captions) else [None] * len(images)
        self._masks = masks or [None] * len(images)

    def samples(self) -> Generator[Sample, None, None]:
        """The images with their captions; a .txt file is read when its image's turn comes."""
        images, stamps = self._images.split("\0"), self._stamps.split("\0")
        for image, stamp, own, mask in zip(images, stamps, self._captions, self._masks, strict=True):
            path = os.path.join(self._root, image)
            captions = own or (_read_caption(os.path.splitext(path)[0] + ".txt"),)
            read_mask = None if mask is None else partial(read_file, mask)
            yield Sample(image, captions, os.path.dirname(image), stamp, path, partial(read_file, path), read_mask)


def list_images(root: str) -> tuple[dict[str, str], list[str]]:
    """Images below a folder by relative path with /, and its metadata.jsonl files.

    With each image stands the size and time of change of the file, after a space those of the .txt beside it, if any.

    Links to folders come after all else, so that a folder goes by its own path where that is below the root too.

    Raises:
        UserError: a folder that cannot be listed.
    """
    images: dict[str, str] = {}
    metadata: list[str] = []
    seen: set[str] = set()
    folders = [("", os.path.realpath(root))]
    links: list[str] = []
    bar = progress(desc="listing", unit="file", show=os.environ.get("LOCAL_RANK", "0") == "0")
    while folders or links:
        if folders:
            prefix, real = folders.pop()
        else:
            prefix = heapq.heappop(links)
            real = os.path.realpath(os.path.join(root, prefix))
        if real in seen:
            continue
        seen.add(real)
        found: list[tuple[str, str, str]] = []
        texts: dict[str, str] = {}
        for entry in _scan(os.path.join(root, prefix)):
            name = entry.name
            stem, dot, suffix = name.rpartition(".")
            suffix = dot and suffix
            if entry.is_dir(follow_symlinks=False):
                folders.append((f"{prefix}{name}/", os.path.join(real, name)))
            elif entry.is_symlink() and (status := _status(entry)) is not None and stat.S_ISDIR(status.st_mode):
                heapq.heappush(links, f"{prefix}{name}/")
            elif name == "metadata.jsonl":
                metadata.append(prefix + name)
            elif suffix == "txt":
                status = _status(entry)
                if status is not None and stat.S_ISREG(status.st_mode):
                    texts[stem] = _stamp(status)
            elif suffix.lower() in _SUFFIXES:
                _require_utf8(root, prefix, name)
                status = _status(entry)
                # A link to nothing stays in the list: reading it says what is wrong.
                if status is None or stat.S_ISREG(status.st_mode):
                    found.append((name, stem, _stamp(status)))
        bar.update(len(found) + len(texts))
        for name, stem, stamp in found:
            text = texts.get(stem)
            images[prefix + name] = stamp if text is None else f"{stamp} {text}"
    bar.close()
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


def _require_utf8(root: str, prefix: str, name: str) -> None:
    """A sample's id is a text; bytes that are none would come to light much later."""
    try:
        name.encode()
    except UnicodeEncodeError:
        folder = os.path.join(root, prefix)
        raise UserError(f"{folder}: the file name {os.fsencode(name)!r} is not UTF-8: rename it") from None


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
