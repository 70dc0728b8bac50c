"""Writes a safetensors file that carries the checksum of its content, under its own name only once it is whole."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lpl.base.errors import UserError

HASH = "modelspec.hash_sha256"
UNKNOWN = "0x" + 64 * "0"
PIECE = 2**24


def write_tensors(tensors: Iterable[tuple[str, Tensor]], file: Path, metadata: dict[str, str]) -> int:
    """Writes tensors to a file under a temporary name, syncs and renames it.

    The metadata gain modelspec.hash_sha256, the SHA-256 of all that follows the header.

    Args:
        tensors: names and values; what is contiguous is written from where it lies.
        file: where to; its folder is made.
        metadata: texts by name.

    Returns:
        How many tensors were written.

    Raises:
        UserError: a name given twice, or a value that float16 cannot hold.
        OSError, SafetensorError: a file that cannot be written.
    """
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
    """Puts the content's hash, which is as long, in the place of the unknown one."""
    with file.open("r+b") as out:
        (length,) = struct.unpack("<Q", out.read(8))
        place = 8 + out.read(length).index(UNKNOWN.encode())
        digest = hashlib.sha256()
        while piece := out.read(PIECE):
            digest.update(piece)
        out.seek(place)
        out.write(f"0x{digest.hexdigest()}".encode())
        out.flush()
        os.fsync(out.fileno())
