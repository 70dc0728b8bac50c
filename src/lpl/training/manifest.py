"""What a checkpoint's files must be: their sizes and checksums, in a file that is written last.

A folder without it was never finished; one whose files differ from it was cut short or damaged since.
"""

from __future__ import annotations

import json
from pathlib import Path

from lpl.base.json_files import parse_json, read_object
from lpl.base.output_folder import JUNK
from lpl.base.shapes import REST, TEXT, difference, whole
from lpl.data.files import checksum
from lpl.data.files import sync_file as sync
from lpl.errors import UserError

MANIFEST = {REST: {"bytes": whole(0), "xxh3_128": TEXT}}
FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Reads every file of a folder, notes its size and XXH3 checksum (128 bits), and syncs all of it.

    Raises:
        OSError: the disk is full, or another fault of the file system.
    """
    for path in folder.iterdir():
        sync(path)
    files = {p.name: {"bytes": p.stat().st_size, "xxh3_128": checksum(p)} for p in sorted(folder.iterdir())}
    (folder / FILE).write_text(json.dumps(files, indent=1))
    sync(folder / FILE)
    sync(folder)


def damage(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a folder that write_manifest has described; None: nothing.

    Args:
        folder: to look at.
        read: read every byte; else only sizes are compared.
    """
    try:
        files = parse_json((folder / FILE).read_bytes(), FILE)
        fault = difference(files, MANIFEST)
        if fault is not None:
            return f"{FILE} is not what was written"
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes"
            if read and checksum(folder / name) != expected["xxh3_128"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (UserError, ValueError):  # ValueError: a name with a NUL
        return f"{FILE} is not what was written"
    return None


def unlisted(folder: Path) -> str | None:
    """Something in a folder that write_manifest has described which it did not find there; None: nothing is."""
    try:
        files = read_object(folder / FILE)
        return next((p.name for p in sorted(folder.iterdir()) if p.name not in {FILE, *JUNK, *files}), None)
    except (OSError, UserError):
        return None
