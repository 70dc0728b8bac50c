"""metadata.jsonl: captions of the images of a folder, one JSON object a line."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any

from lpl.base.errors import require
from lpl.base.files import stamp_of, status_of
from lpl.base.text import read_rows, read_text
from lpl.data.sources.base import IMAGE_SUFFIXES, PIECE_SIZE, Piece, Sample, captions_of, digest, one_line, read_file
from lpl.data.sources.listing import Listing, list_images, tell_left_out
from lpl.data.sources.remote import Versions


class Names:
    """One name for each file that metadata can name, however it is written: relative, absolute, or through links.

    Args:
        root: the folder.
        listing: its files; those that are named but not in it (of other endings, or elsewhere) are added.
    """

    def __init__(self, root: str, listing: Listing) -> None:
        self._root, self.listing = root, listing
        self._real: dict[str, str] = {}
        self._places: dict[str, str] | None = None

    def find(self, path: str) -> str | None:
        """The name of a file, relative to the root and with / where it is below; None: it is not there."""
        files = self.listing.images
        path = os.path.normpath(path)
        name = path.replace(os.sep, "/")
        if name in files:
            return name
        whole = os.path.join(self._root, path)
        if "\0" in whole:
            return None
        folder, base = os.path.split(whole)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        prefix = self.listing.folders.get(self._real[folder])
        if prefix is not None and prefix + base in files:
            return prefix + base
        status = status_of(whole)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        if self._places is None:
            self._places = {os.path.realpath(os.path.join(self._root, known)): known for known in sorted(files)[::-1]}
        name = self._places.setdefault(os.path.realpath(whole), name if prefix is None else prefix + base)
        files.setdefault(name, stamp_of(status, whole))
        return name


def read_metadata(
    root: str, names: Names, caption_column: str, may_lack: bool = False, may_have_prompt: bool = True
) -> dict[str, tuple[str, ...]]:
    """Captions by image, relative to the root and with /.

    Args:
        root: the folder.
        names: its files; `file_name` in a metadata.jsonl is relative to that one's own folder.
        caption_column: key of a caption or a list of captions.
        may_lack: a row may have no caption; there is none of its image then.
        may_have_prompt: --instance_prompt would make up for that.

    Raises:
        UserError: a line that is faulty, that names a missing file, or an image that is listed twice.
    """
    captions: dict[str, tuple[str, ...]] = {}
    listed: set[str] = set()
    missing: list[str] = []
    repeated: list[str] = []
    for metadata in names.listing.metadata:
        folder = os.path.dirname(metadata)
        for where, row in read_rows(os.path.join(root, metadata)):
            file_name, value = _parse(row, where, caption_column, may_lack, may_have_prompt)
            image = names.find(os.path.join(folder, file_name))
            if image is None:
                slashed = file_name.replace("\\", "/")
                there = slashed != file_name and names.find(os.path.join(folder, slashed)) is not None
                missing.append(f"{where}: {file_name}" + there * f" (write {slashed}: folders are parted by /)")
            elif image in listed:
                repeated.append(f"{where}: {file_name}")
            else:
                listed.add(image)
                if value is not None:
                    captions[image] = value
    require(
        not missing,
        f"{missing[0] if missing else ''} does not exist ({len(missing)} such in all): correct the line or remove it",
    )
    require(
        not repeated,
        f"{repeated[0] if repeated else ''} is listed a second time ({len(repeated)} such in all): keep one line for "
        "each image, with a list of captions if there are several",
    )
    return captions


def _parse(
    row: dict[str, Any], where: str, caption_column: str, may_lack: bool, may_have_prompt: bool
) -> tuple[str, tuple[str, ...] | None]:
    keys = ", ".join(row) or "none"
    file_name = row.get("file_name")
    require(isinstance(file_name, str) and file_name != "", f"{where}: no key file_name; its keys: {keys}")
    assert isinstance(file_name, str)
    if may_lack and row.get(caption_column) in (None, []):
        return file_name, None
    prompt = ", or give all images without one the same caption with --instance_prompt" * may_have_prompt
    require(
        caption_column in row,
        f"{where}: no key {caption_column}; its keys: {keys}; name the captions' key with --caption_column{prompt}",
    )
    return file_name, captions_of(row[caption_column], where, may_have_prompt=may_have_prompt)


ENDING = "-masklabel.png"
"""OneTrainer's: x-masklabel.png is the mask of x.jpg."""


def beside(images: Iterable[str]) -> set[str]:
    """Those of some images (paths with /) that are the mask of another one."""
    names = set(images)
    stems = {os.path.splitext(name)[0] for name in names}
    return {name for name in names if name.endswith(ENDING) and name[: -len(ENDING)] in stems}


def masks_beside(images: Sequence[str], masks: set[str]) -> list[str | None]:
    """The mask of each image, of those that `beside` found; None: it has none."""
    named = (os.path.splitext(image)[0] + ENDING for image in images)
    return [name if name in masks else None for name in named]


def masks_in(folder: str, images: Sequence[str], stamps: dict[str, str]) -> list[str | None]:
    """The mask of each image, among the files of a folder that `list_images` found; None: it has none.

    It has the image's relative path, but perhaps another ending: of several, the image's own, or the first.

    Raises:
        UserError: no image has one.
    """
    by_stem: dict[str, str] = {}
    for name in sorted(stamps):
        by_stem.setdefault(os.path.splitext(name)[0], name)
    found = [image if image in stamps else by_stem.get(os.path.splitext(image)[0]) for image in images]
    require(
        any(name is not None for name in found),
        f"--mask_dir {folder}: none of its {len(stamps)} images has the name of a training image, such as "
        f"{images[0]}: name the masks as the images (other endings: {' '.join(IMAGE_SUFFIXES)})",
    )
    return found


logger = logging.getLogger("lpl")


class FolderSource:
    """A folder of images, nested as deep as one likes, in the order of their paths.

    Captions come from `metadata.jsonl` files (one in any folder; `file_name` is relative to it; a list holds several
    captions of one image) or else from a file beside the image, which holds one caption: of x.png x.txt, x.caption or
    x.png.txt; or else they are the instance prompt. A sample's id is its path relative to the folder, with /. Hidden
    files and folders are left out; links to folders are followed, but no folder is listed twice. What else is left out
    is counted in the log.

    Args:
        folder: the folder.
        caption_column: key of the captions in metadata.jsonl.
        max_samples: use only the first so many images.
        flag: what named the folder.
        masks: samples have masks: x-masklabel.png beside x.jpg. Such files are no images of their own, masks or not.
        mask_dir: another folder, where masks have their images' relative paths; with masks.
        instance_prompt: caption of the images that have none; None: there must be no such image.

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
        instance_prompt: str | None = None,
    ) -> None:
        self.name = f"{flag} {folder}"
        self.identity, self.versions = f"folder {os.path.abspath(folder)} {caption_column}", Versions()
        instead = ", or name a data set with --dataset_name" if flag == "--train_data_dir" else ""
        require(
            os.path.isdir(folder),
            f"{self.name}: {'not a folder' if os.path.exists(folder) else 'no such folder'}: give an image "
            f"folder{instead}",
        )
        self._flag, self._masks, self._mask_dir = flag, masks, mask_dir
        self._pieces = self._list(folder, caption_column, max_samples, instance_prompt)
        self.size: int | None = sum(piece.size or 0 for piece in self._pieces)

    def pieces(self) -> Sequence[Piece]:
        """Slices of the sorted paths."""
        return self._pieces

    def _list(self, root: str, caption_column: str, max_samples: int | None, prompt: str | None) -> list[FolderPiece]:
        listing = list_images(root)
        files = listing.images
        # Regularisation images show what the others do not: a prompt for both would undo them.
        may_have = self._flag != "--reg_data_dir"
        captions = read_metadata(root, Names(root, listing), caption_column, prompt is not None, may_have)
        self._tell(listing, captions)
        masks = {name: files.pop(name) for name in beside(files)}
        images = sorted(files)[:max_samples]
        require(bool(images), f"{self.name}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
        missing = [name for name in images if name not in captions and " " not in files[name]]
        remedy = "; or give all without one the same with --instance_prompt" * may_have
        require(
            not missing or prompt is not None,
            f"{self.name}: {len(missing)} of {len(images)} images have no caption, first "
            f"{missing[0] if missing else ''}: list them in metadata.jsonl, or put a .txt of the same name beside "
            f"each{remedy}",
        )
        captions |= dict.fromkeys(missing, (str(prompt),))
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

    def _tell(self, listing: Listing, captions: dict[str, tuple[str, ...]]) -> None:
        shadowed = sorted(name for name in captions if " " in listing.images[name])
        told = tell_left_out(listing, shadowed)
        if told:
            logger.warning("%s: %s", self.name, told)

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
            masks = list_images(folder).images
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
        """The images with their captions; a caption file is read when its image's turn comes."""
        images, stamps = self._images.split("\0"), self._stamps.split("\0")
        for image, stamp, own, mask in zip(images, stamps, self._captions, self._masks, strict=True):
            path = os.path.join(self._root, image)
            captions = own or (_read_caption(path, stamp),)
            read_mask = None if mask is None else partial(read_file, mask)
            yield Sample(image, captions, os.path.dirname(image), stamp, path, partial(read_file, path), read_mask)


def _read_caption(image: str, stamp: str) -> str:
    """The caption in the file beside an image, whose ending is in its stamp (see Listing.images)."""
    _, _, *ending = stamp.partition("|")[0].split(" ")
    return one_line(read_text(os.path.splitext(image)[0] + (ending[0] if ending else ".txt")))
