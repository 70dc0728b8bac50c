"""Safetensors files: the header, read before anything is mapped, and a writer of whole files with a checksum."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpl.base.errors import UserError
from lpl.base.json_files import NULL, REST, TEXT, Kind, Shape, parse_json, require_shape, whole

if TYPE_CHECKING:  # headers are read before torch loads
    from torch import Tensor

HASH = "modelspec.hash_sha256"
UNKNOWN = "0x" + 64 * "0"
METADATA = "__metadata__"
LONGEST = 100_000_000
"""Most bytes of a header: safetensors reads no longer one."""
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
    """The header, from its bytes without the length before them; `where` is the file that errors name.

    Raises:
        UserError: it is no such header.
    """
    found: dict[str, Any] = parse_json(content, where)
    require_shape(found, HEADER, where)
    return found


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file, which is checked to be long enough for all tensors in it.

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


def write_tensors(tensors: Iterable[tuple[str, Tensor]], file: Path, metadata: dict[str, str]) -> int:
    """Writes tensors to a file under a temporary name, syncs and renames it.

    The metadata gain modelspec.hash_sha256, the SHA-256 of all that follows the header.

    Returns:
        How many tensors were written.

    Raises:
        UserError: a name given twice, or a value that float16 cannot hold.
        OSError, SafetensorError: a file that cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    content: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in content:
            raise UserError(f"{name}: two weights have this name in the file")
        if tensor.dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name}: holds a value that float16 cannot: use --dtype bfloat16 or float32")
        content[name] = tensor.detach().contiguous()
    temporary = file.with_name(f".{file.name}.lpl-tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        readable = temporary.stat().st_mode  # as the umask says; safetensors writes for the owner alone
        save_file(content, temporary, metadata | {HASH: UNKNOWN})
        temporary.chmod(readable)
        _seal(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(content)


def _seal(file: Path) -> None:
    """Replaces the placeholder by the content's hash, which has the same length."""
    with file.open("r+b") as out:
        (length,) = struct.unpack("<Q", out.read(8))
        place = 8 + out.read(length).index(UNKNOWN.encode())
        digest = hashlib.sha256()
        while block := out.read(2**24):
            digest.update(block)
        out.seek(place)
        out.write(f"0x{digest.hexdigest()}".encode())
        out.flush()
        os.fsync(out.fileno())
