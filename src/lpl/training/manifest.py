"""What a checkpoint's files must be: their sizes and checksums, in a file that is written last.

A folder without it was never finished; one whose files differ from it was cut short or damaged since.
"""

from __future__ import annotations

import json
from pathlib import Path

from lpl.base.errors import UserError
from lpl.base.files import checksum
from lpl.base.files import sync_file as sync
from lpl.base.json_files import REST, TEXT, difference, parse_json, read_object, whole
from lpl.base.output_folder import JUNK

ENTRIES = {REST: {"bytes": whole(0), "xxh3_128": TEXT}}
MANIFEST = "manifest.json"
RESULT = ".tmp-result"
"""A result that is being written."""


def write_manifest(folder: Path) -> None:
    """Reads every file of a folder, notes its size and XXH3 checksum (128 bits), and syncs all of it.

    Raises:
        OSError: the disk is full, or another fault of the file system.
    """
    for path in folder.iterdir():
        sync(path)
    files = {p.name: {"bytes": p.stat().st_size, "xxh3_128": checksum(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def damage(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a folder that write_manifest has described; None: nothing.

    Args:
        folder: to look at.
        read: read every byte; else only sizes are compared.
    """
    try:
        files = parse_json((folder / MANIFEST).read_bytes(), MANIFEST)
        fault = difference(files, ENTRIES)
        if fault is not None:
            return f"{MANIFEST} is not what was written"
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
        return f"{MANIFEST} is not what was written"
    return None


def unlisted(folder: Path) -> str | None:
    """Something in a folder that write_manifest has described which it did not find there; None: nothing is."""
    try:
        files = read_object(folder / MANIFEST)
        return next((p.name for p in sorted(folder.iterdir()) if p.name not in {MANIFEST, *JUNK, *files}), None)
    except (OSError, UserError):
        return None
