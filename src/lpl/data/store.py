"""A store of small dicts of tensors on disk, shared by runs and by processes that write at the same time."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpl.data.files import write_atomically
from lpl.data.shard import KEY_BYTES, SUFFIX, Layout, Shard, pack
from lpl.errors import UserError

INDEX = "index.npz"
MAPPED_BYTES = 2**28
"""Shards are unmapped, oldest first, once this much of them has been read: memory stays flat."""
OPEN_SHARDS = 256
"""At most so many are mapped at a time: each takes a file handle."""
UNZIP_ERRORS = (OSError, ValueError, LookupError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
"""What numpy raises on an .npz file that is damaged."""


class Index(NamedTuple):
    """Where entries are, sorted by the first 8 bytes of their keys; replaced as a whole, so that threads may look."""

    prefixes: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    """(N, 2), int32: number of the shard, row in it."""


class TensorStore:
    """Dicts of tensors by 20-byte key, in a folder of safetensors shards that never change once they have their name.

    The entries of a shard have one shape. Opening reads an index of keys, shards and rows (28 bytes an entry), and of
    shards that are newer than it their keys; tensors are mapped into memory and read on demand. A shard appears whole
    or not at all.

    Args:
        folder: where the shards are; made when something is first written.

    Raises:
        UserError: a shard that is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[str] = []
        self._index = Index(np.empty(0, np.uint64), np.empty((0, KEY_BYTES), np.uint8), np.empty((0, 2), np.int32))
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._indexed: list[str] = []
        self.refresh()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._index.keys)

    def __contains__(self, key: bytes) -> bool:
        """Whether an entry is there."""
        return self._find(key) is not None

    def shard_of(self, key: bytes) -> str:
        """Name of the shard that holds an entry.

        Raises:
            KeyError: no such entry.
        """
        return self.shards[self._at(key)[0]]

    def layout(self, key: bytes) -> Layout:
        """Dtype and shape of an entry's tensors by field."""
        return self._shard(self._at(key)[0]).layout

    def entry_bytes(self, key: bytes) -> int:
        """Bytes of an entry's tensors."""
        shard = self._shard(self._at(key)[0])
        return sum(shard.fields[name].row_bytes for name in shard.layout)

    def gather(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """The tensors of entries of one shape, stacked in the order of the keys, by field: copies on the CPU.

        Raises:
            KeyError: no such entry.
            ValueError: entries of several shapes.
        """
        stacked: dict[str, Tensor] = {}
        rows: dict[str, np.ndarray] = {}
        layout: Layout = {}
        for position, (number, row) in enumerate(self._places(keys)):
            shard = self._shard(number)
            if position == 0:
                layout = shard.layout
                for name, (dtype, shape) in layout.items():
                    stacked[name] = torch.empty((len(keys), *shape), dtype=dtype)
                    rows[name] = stacked[name].view(len(keys), -1).view(torch.uint8).numpy()
            elif shard.layout != layout:
                raise ValueError(f"entries of several shapes: {layout} and {shard.layout}")
            for name, target in rows.items():
                target[position] = shard.row(name, row)
        return stacked

    def write(self, keys: Sequence[bytes], fields: Mapping[str, Tensor], scratch: Path | None = None) -> None:
        """Stores N entries in one new shard, and returns when it is safely on disk.

        Args:
            keys: N of 20 bytes.
            fields: (N, ...) each.
            scratch: folder for the temporary file, on the same file system; None: beside the shards.

        Raises:
            UserError: the folder cannot be written.
            ValueError: keys or fields that cannot be stored.
        """
        if not keys:
            return
        content = pack(keys, fields)
        name = hashlib.blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest() + SUFFIX
        try:
            write_atomically(self.folder / name, content, scratch)
        except OSError as error:
            raise UserError(
                f"cache {self.folder} cannot be written ({error.strerror}): make room there, or name another folder "
                "with --latent_cache_dir"
            ) from error
        self._add([name])

    def refresh(self) -> None:
        """Takes up shards that other processes have written since.

        Raises:
            UserError: a shard that is cut short.
        """
        there = sorted(_shards_in(self.folder))
        if not self.shards and there:
            self._read_index(set(there))
        have = set(self.shards)
        self._add([name for name in there if name not in have])

    def save_index(self, scratch: Path | None = None) -> None:
        """Writes the index beside the shards, so that the next opening need not look into each."""
        if not self.shards or self.shards == self._indexed:
            return
        by_name = np.argsort(np.asarray(self.shards))
        number = np.empty(len(by_name), np.int32)
        number[by_name] = np.arange(len(by_name), dtype=np.int32)
        places = np.stack([number[self._index.places[:, 0]], self._index.places[:, 1]], 1)
        order = np.lexsort((places[:, 1], places[:, 0]))
        buffer = io.BytesIO()
        np.savez(buffer, shards=np.asarray(self.shards)[by_name], keys=self._index.keys[order], places=places[order])
        write_atomically(self.folder / INDEX, buffer.getvalue(), scratch)
        self._indexed = list(self.shards)

    def _read_index(self, there: set[str]) -> None:
        path = self.folder / INDEX
        if not path.is_file():
            return
        try:
            with np.load(path, allow_pickle=False) as index:
                shards, keys, places = index["shards"].tolist(), index["keys"], index["places"]
        except UNZIP_ERRORS:
            return  # an index says nothing that the shards do not: they are read instead
        if set(shards) <= there:
            self.shards, self._indexed = shards, list(shards)
            self._index = _sorted_index(keys, places)

    def _add(self, names: Sequence[str]) -> None:
        keys, places = [], []
        for name in names:
            found = Shard(self.folder / name).keys()
            number = np.full(len(found), len(self.shards), np.int32)
            self.shards.append(name)
            keys.append(found)
            places.append(np.stack([number, np.arange(len(found), dtype=np.int32)], 1))
        if names:
            old, new = self._index, _sorted_index(np.concatenate(keys), np.concatenate(places))
            at = np.searchsorted(old.prefixes, new.prefixes, side="right")  # merged: most often few come to many
            self._index = Index(*(np.insert(a, at, b, axis=0) for a, b in zip(old, new, strict=True)))

    def _find(self, key: bytes) -> tuple[int, int] | None:
        prefixes, keys, places = self._index
        prefix = np.frombuffer(key, np.uint64, 1)[0]
        at = int(np.searchsorted(prefixes, prefix))
        while at < len(prefixes) and prefixes[at] == prefix:
            if keys[at].tobytes() == key:
                shard, row = places[at]
                return int(shard), int(row)
            at += 1
        return None

    def _places(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """`_at` of many keys."""
        prefixes, own, places = self._index
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        at = np.searchsorted(prefixes, np.ascontiguousarray(wanted[:, :8]).view(np.uint64).ravel())
        at = np.minimum(at, len(own) - 1)
        if len(own) and np.array_equal(own[at], wanted):
            return [(shard, row) for shard, row in places[at].tolist()]
        return [self._at(key) for key in keys]  # one is not there, or two begin alike

    def _at(self, key: bytes) -> tuple[int, int]:
        place = self._find(key)
        if place is None:
            raise KeyError(key.hex())
        return place

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = Shard(self.folder / self.shards[number])
            while len(self._open) > 1 and (
                len(self._open) > OPEN_SHARDS or sum(s.touched for s in self._open.values()) > MAPPED_BYTES
            ):
                self._open.popitem(last=False)
        return shard


def _sorted_index(keys: np.ndarray, places: np.ndarray) -> Index:
    prefixes = np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel()
    order = np.argsort(prefixes, kind="stable")
    return Index(prefixes[order], keys[order], places[order].astype(np.int32))


def _shards_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [name for name in os.listdir(folder) if name.endswith(SUFFIX) and not name.startswith(".")]
