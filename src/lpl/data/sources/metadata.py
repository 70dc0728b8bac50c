"""metadata.jsonl: captions of the images of a folder, one JSON object a line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from lpl.config import require
from lpl.data.sources.base import captions_of
from lpl.errors import UserError
from lpl.json_files import parse_row


def read_metadata(
    root: str, names: Sequence[str], caption_column: str, exists: Callable[[str], bool]
) -> dict[str, tuple[str, ...]]:
    """Captions by image, relative to the root and with /.

    Args:
        root: the folder.
        names: its metadata.jsonl files, relative to the root; `file_name` in them is relative to their own folder.
        caption_column: key of a caption or a list of captions.
        exists: whether an image (relative to the root) is there.

    Raises:
        UserError: a line that is faulty, that names a missing file, or an image that is listed twice.
    """
    captions: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    repeated: list[str] = []
    for name in names:
        for where, line in _lines(os.path.join(root, name)):
            file_name, value = _parse(line, where, caption_column)
            image = os.path.normpath(os.path.join(os.path.dirname(name), file_name)).replace(os.sep, "/")
            if image in captions:
                repeated.append(f"{where}: {file_name}")
            elif not exists(image):
                missing.append(f"{where}: {file_name}")
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


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """What to call each line that is not empty, and its text."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
                if text.strip():
                    yield where, text
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): correct its permissions or remove it") from None


def _parse(line: str, where: str, caption_column: str) -> tuple[str, tuple[str, ...]]:
    entry = parse_row(line, where, "write one JSON object a line")
    keys = ", ".join(entry) or "none"
    file_name = entry.get("file_name")
    if not isinstance(file_name, str):
        raise UserError(f"{where}: no key file_name; its keys: {keys}")
    require(
        caption_column in entry,
        f"{where}: no key {caption_column}; its keys: {keys}; name the captions' key with --caption_column",
    )
    return file_name, captions_of(entry[caption_column], where)
