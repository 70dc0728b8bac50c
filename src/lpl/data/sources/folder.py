"""A folder of image files. Listing it reads metadata.jsonl files, but no image and no caption file.

Differs from datasets' own image folder: an image without a caption is refused, as is a caption without an image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from functools import partial

from lpl.base.text import read_text
from lpl.config import require
from lpl.data.sources.base import IMAGE_SUFFIXES, PIECE_SIZE, Piece, Sample, digest, one_line, read_file
from lpl.data.sources.left_out import tell_left_out
from lpl.data.sources.listing import Listing, list_images
from lpl.data.sources.mask_files import ENDING, beside, masks_beside, masks_in
from lpl.data.sources.metadata import Names, read_metadata
from lpl.data.sources.versions import Versions

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
