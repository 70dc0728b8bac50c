"""The header of a safetensors file: names, types, shapes and places of its tensors, read before anything is mapped."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.json_files import NULL, REST, TEXT, Kind, Shape, parse_json, require_shape, whole

METADATA = "__metadata__"
LONGEST = 100_000_000
"""Bytes of a header; safetensors reads no longer one."""
PLACE = whole(0, 2**62)
HEADER: Shape = {
    f"{METADATA}?": ({REST: TEXT}, NULL),
    REST: {
        "dtype": TEXT,
        "shape": [PLACE],
        "data_offsets": Kind("two places", lambda v: isinstance(v, list) and len(v) == 2 and all(map(PLACE.fits, v))),
    },
}


def parse_header(content: bytes, where: str) -> dict[str, Any]:
    """The header that these bytes are.

    Args:
        content: of the file, behind the eight bytes of its length.
        where: the file that errors name.

    Raises:
        UserError: it is none.
    """
    found: dict[str, Any] = parse_json(content, where)
    require_shape(found, HEADER, where)
    return found


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file that holds all tensors it speaks of.

    Raises:
        UserError: it cannot be read, is something else, or is cut short.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if length > min(size, LONGEST):
                raise UserError(f"{path}: no safetensors file, or cut short")
            header = parse_header(file.read(length), str(path))
    except (OSError, struct.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    if size < 8 + length + end:
        raise UserError(f"{path}: cut short: {size} of {8 + length + end} bytes")
    return header
