"""Which mask file goes with which image of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from lpl.config import require
from lpl.data.sources.base import IMAGE_SUFFIXES

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
