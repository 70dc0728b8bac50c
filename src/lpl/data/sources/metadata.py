"""metadata.jsonl: captions of the images of a folder, one JSON object a line."""

from __future__ import annotations

import os
import stat
from typing import Any

from lpl.base.text import read_rows
from lpl.config import require
from lpl.data.files import stamp_of, status_of
from lpl.data.sources.base import captions_of
from lpl.data.sources.listing import Listing


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
