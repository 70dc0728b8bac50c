"""A folder of images, with captions in metadata.jsonl or in files beside them, and masks."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any

from lpl.base.errors import UserError, require
from lpl.base.files import stamp_of, status_of
from lpl.base.text import read_rows, read_text
from lpl.config import DataConfig
from lpl.data.sources.base import (
    IMAGE_SUFFIXES,
    PIECE_SIZE,
    Piece,
    Sample,
    Source,
    captions_of,
    digest,
    one_line,
    read_file,
)
from lpl.data.sources.listing import Listing, list_images, tell_left_out


class Names:
    """One name for each file that metadata can name, however it is written: relative, absolute, or through links.

    Files that are named but not in the listing (of other endings, or elsewhere) are added to it.
    """

    def __init__(self, root: str, listing: Listing) -> None:
        self._root, self.listing = root, listing
        self._real: dict[str, str] = {}
        self._places: dict[str, str] | None = None

    def find(self, path: str) -> str | None:
        """The name of a file, relative to the root and with / if it lies below it; None: it does not exist."""
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
    root: str, names: Names, caption_column: str, may_lack: bool, may_have_prompt: bool
) -> dict[str, tuple[str, ...]]:
    """Captions by image, relative to the root and with /; `file_name` is relative to its metadata.jsonl's own folder.

    Args:
        may_lack: a row may have no caption; the result then has none for its image.
        may_have_prompt: --instance_prompt could replace it; for the message.

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
                missing.append(f"{where}: {file_name}" + there * f" (write {slashed}: / separates folders)")
            elif image in listed:
                repeated.append(f"{where}: {file_name}")
            else:
                listed.add(image)
                if value is not None:
                    captions[image] = value
    if missing:
        raise UserError(f"{missing[0]} does not exist ({len(missing)} such in all): correct the line or remove it")
    if repeated:
        raise UserError(
            f"{repeated[0]} is listed a second time ({len(repeated)} such in all): keep one line for each image, with "
            "a list of captions if there are several"
        )
    return captions


def _parse(
    row: dict[str, Any], where: str, caption_column: str, may_lack: bool, may_have_prompt: bool
) -> tuple[str, tuple[str, ...] | None]:
    keys = ", ".join(row) or "none"
    file_name = row.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise UserError(f"{where}: no key file_name; its keys: {keys}")
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


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _beside(images: Iterable[str]) -> set[str]:
    """Those of some images (paths with /) that are the mask of another one."""
    stems = set(map(_stem, images))
    return {name for name in images if name.endswith(ENDING) and name[: -len(ENDING)] in stems}


def masks_in(folder: str, images: Sequence[str], masks: Iterable[str]) -> list[str | None]:
    """The mask of each image, among the files of a folder; None: it has none.

    It has the image's relative path, but perhaps another ending: of several, the image's own, or the first.

    Raises:
        UserError: no image has one.
    """
    by_stem: dict[str, str] = {}
    for name in sorted(masks):
        by_stem.setdefault(_stem(name), name)
    there = set(masks)
    found = [image if image in there else by_stem.get(_stem(image)) for image in images]
    require(
        any(found),
        f"--mask_dir {folder}: none of its {len(there)} images has the name of a training image, such as "
        f"{images[0]}: name the masks as the images (other endings: {' '.join(IMAGE_SUFFIXES)})",
    )
    return found


logger = logging.getLogger("lpl")
TRAIN_FLAG = "--train_data_dir"


def open_folder(root: str, config: DataConfig, flag: str) -> Source:
    """A folder of images, nested to any depth, in the order of their paths.

    Captions come from `metadata.jsonl` files (one in any folder; `file_name` is relative to it; a list holds several
    captions of one image) or else from a file beside the image, which holds one caption: for x.png x.txt, x.caption or
    x.png.txt; or else they are the instance prompt, except for regularisation images. A sample's id is its path
    relative to the folder, with /. Hidden files and folders are left out; links to folders are followed, but no folder
    is listed twice. What else is left out is counted in the log.

    With --masked_loss files, x-masklabel.png beside x.jpg is its mask, or the file in --mask_dir with the training
    image's relative path. Files with such names beside images never count as images, masks in use or not.

    Args:
        root: the folder.
        config: the options; --max_train_samples and --mask_dir are those of the training images alone.
        flag: what named the folder.

    Raises:
        UserError: no folder, no images, an image without caption, a faulty metadata.jsonl, or a mask_dir without masks.
    """
    name, is_train = f"{flag} {root}", flag == TRAIN_FLAG
    instead = ", or name a data set with --dataset_name" * is_train
    require(
        os.path.isdir(root),
        f"{name}: {'not a folder' if os.path.exists(root) else 'no such folder'}: give an image folder{instead}",
    )
    listing = list_images(root)
    files = listing.images
    # Regularisation images show something else than the others: one prompt for both would defeat their purpose.
    may_have = flag != "--reg_data_dir"
    prompt = config.instance_prompt if may_have else None
    captions = read_metadata(root, Names(root, listing), config.caption_column, prompt is not None, may_have)
    if told := tell_left_out(listing, sorted(image for image in captions if " " in files[image])):
        logger.warning("%s: %s", name, told)
    masks = {mask: files.pop(mask) for mask in _beside(files)}
    images = sorted(files)[: config.max_train_samples if is_train else None]
    require(bool(images), f"{name}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    missing = [image for image in images if image not in captions and " " not in files[image]]
    if missing and prompt is None:
        remedy = "; or give all without one the same with --instance_prompt" * may_have
        raise UserError(
            f"{name}: {len(missing)} of {len(images)} images have no caption, first {missing[0]}: list them in "
            f"metadata.jsonl, or put a .txt of the same name beside each{remedy}"
        )
    captions |= dict.fromkeys(missing, (str(prompt),))
    found = _masks_of(root, name, images, masks, config, is_train)
    pieces = []
    for start in range(0, len(images), PIECE_SIZE):
        part, own_masks = images[start : start + PIECE_SIZE], found[start : start + PIECE_SIZE]
        own = [captions.get(image) for image in part]
        # taken out of files: memory would hold a large folder twice
        stamps = [
            _with_captions(files.pop(image), given) + (f"|{mask[1]}" if mask else "")
            for image, given, mask in zip(part, own, own_masks, strict=True)
        ]
        stamp = digest(*(each for pair in zip(part, stamps, strict=True) for each in pair))
        joined = "\0".join(part), "\0".join(stamps)  # a fifth of the memory of as many strings
        samples = partial(_samples, root, *joined, own, [mask[0] if mask else None for mask in own_masks])
        pieces.append(Piece(str(start // PIECE_SIZE), stamp, len(part), samples))
    return Source(name, f"folder {os.path.abspath(root)} {config.caption_column}", pieces, len(images))


def _masks_of(
    root: str, source: str, images: list[str], masks: dict[str, str], config: DataConfig, is_train: bool
) -> list[tuple[str, str] | None]:
    """Path and stamp of each image's mask; `masks`: stamps of those beside the images."""
    if config.masked_loss != "files":
        if masks:
            logger.warning(
                "%s: %d files end in %s: they are masks, which only --masked_loss files uses",
                *(source, len(masks), ENDING),
            )
        return [None] * len(images)
    folder = config.mask_dir if is_train else None
    names: list[str | None]
    if folder is None:
        names = [mask if (mask := _stem(image) + ENDING) in masks else None for image in images]
        require(
            any(names) or not is_train,
            f"--masked_loss files: no image of {source} has a mask beside it: name them as the images, with {ENDING} "
            "for their ending, or name another folder with --mask_dir",
        )
    else:
        require(os.path.isdir(folder), f"--mask_dir {folder}: no such folder: name the folder that the masks are in")
        require(
            not os.path.join(os.path.realpath(folder), "").startswith(os.path.join(os.path.realpath(root), "")),
            f"--mask_dir {folder} lies in {source}: its files would be taken for training images; move it out",
        )
        masks = list_images(folder).images
        names = masks_in(folder, images, masks)
    return [None if mask is None else (os.path.join(folder or root, mask), masks[mask]) for mask in names]


def _with_captions(stamp: str, captions: tuple[str, ...] | None) -> str:
    return stamp if captions is None else f"{stamp.partition(' ')[0]} {digest(*captions)}"


def _samples(
    root: str, images: str, stamps: str, captions: Sequence[tuple[str, ...] | None], masks: Sequence[str | None]
) -> Generator[Sample, None, None]:
    """The images of a piece; without captions of its own, an image's caption file is read when its turn comes."""
    for image, stamp, own, mask in zip(images.split("\0"), stamps.split("\0"), captions, masks, strict=True):
        path = os.path.join(root, image)
        read_mask = None if mask is None else partial(read_file, mask)
        given = own or (_read_caption(path, stamp),)
        yield Sample(image, given, os.path.dirname(image), stamp, path, partial(read_file, path), read_mask)


def _read_caption(image: str, stamp: str) -> str:
    """The caption in the file beside an image, whose ending is in its stamp (see Listing.images)."""
    _, _, *ending = stamp.partition("|")[0].split(" ")
    return one_line(read_text(_stem(image) + (ending[0] if ending else ".txt")))
