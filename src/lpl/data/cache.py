"""A store of small dicts of tensors on disk, shared by runs and by processes that write at the same time."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lpl.errors import UserError

SUFFIX = ".safetensors"


def default_cache_dir() -> Path:
    """The user's cache folder for this package: $XDG_CACHE_HOME/lpl, or ~/.cache/lpl."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lpl"


class TensorCache:
    """Dicts of tensors by key, in a folder of safetensors shards that never change once they have their name.

    A shard holds several entries, each tensor as `<key>/<field>`. Opening reads the shards' headers only; the tensors
    are mapped into memory and read on demand. A shard appears whole or not at all: it is written under a temporary
    name, which readers ignore, and then renamed.

    Args:
        folder: where the shards are; made when something is first written.

    Raises:
        UserError: a shard that is cut short or corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Any] = {}
        self._index: dict[str, tuple[str, list[str]]] = {}
        self.refresh()

    def __contains__(self, key: object) -> bool:
        """Whether an entry is there."""
        return key in self._index

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._index)

    def keys(self) -> KeysView[str]:
        """Keys of all entries."""
        return self._index.keys()

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry by field, as copies on the CPU.

        Raises:
            KeyError: no such entry.
        """
        shard, names = self._index[key]
        handle = self._shards[shard]
        return {name.rpartition("/")[2]: handle.get_tensor(name).clone() for name in names}

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Stores entries in one new shard, and returns when it is safely on disk.

        Args:
            entries: tensors of any shape and dtype by key and field; neither may be empty or contain a /.

        Raises:
            UserError: the folder cannot be written.
            ValueError: a key or field that cannot be stored.
        """
        if not entries:
            return
        for key, fields in entries.items():
            if not key or not fields or any(not name or "/" in name for name in (key, *fields)):
                raise ValueError(f"cannot store key {key!r} with fields {list(fields)}")
        tensors = {
            f"{key}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
            for key, fields in entries.items()
            for name, tensor in fields.items()
        }
        digest = hashlib.blake2b("\n".join(sorted(entries)).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{digest}{SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, save(tensors))
        except OSError as error:
            raise UserError(
                f"cache {self.folder} cannot be written ({error.strerror}): make room there, or name another folder "
                "with --latent_cache_dir"
            ) from error
        self._read_header(path)

    def refresh(self) -> None:
        """Takes up shards that other processes have written since.

        Raises:
            UserError: a shard that is cut short or corrupt.
        """
        if self.folder.is_dir():
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                if path.name not in self._shards:
                    self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            handle = safe_open(path, framework="pt", device="cpu")
            names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"cache shard {path} is damaged ({error}): delete it and run again") from error
        self._shards[path.name] = handle
        entries: dict[str, list[str]] = {}
        for name in names:
            entries.setdefault(name.rpartition("/")[0], []).append(name)
        for key, fields in entries.items():
            self._index.setdefault(key, (path.name, fields))


def _write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it; on failure nothing is left behind."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
