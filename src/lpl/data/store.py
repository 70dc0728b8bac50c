"""A store of small dicts of tensors on disk, shared by runs and by processes that write at the same time."""

from __future__ import annotations

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

from lpl.base.errors import DamagedCacheError
from lpl.base.files import write_cached
from lpl.data.shard import KEY_BYTES, SUFFIX, Layout, Shard, damaged_file, pack

INDEX = "index.npz"
MAPPED_BYTES = 2**28
"""Shards are unmapped, oldest first, once this much of them has been read: memory stays flat."""
OPEN_SHARDS = 256
"""At most this many shards are mapped at a time: each takes a file handle."""
UNZIP_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError)
UNZIP_ERRORS += (MemoryError, struct.error, zlib.error, zipfile.BadZipFile)
"""What numpy raises on an .npz file that is damaged."""


class Index(NamedTuple):
    """Where entries are, sorted by the first 8 bytes of their keys; replaced as a whole: threads may read it."""

    prefixes: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    """(N, 2), int32: number of the shard, row in it."""


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their first dimension at most, stacked; the shorter ones are padded with zeros."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    found = rows[0].new_zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]))
    for target, row in zip(found, rows, strict=True):
        target[: len(row)] = row
    return found


class TensorStore:
    """Dicts of tensors by 20-byte key, in a folder of safetensors shards that never change once they have their name.

    The entries of a shard have one shape. Opening reads an index of keys, shards and rows (28 bytes an entry), and the
    keys of shards that are newer than it; tensors are mapped into memory and read on demand. A shard appears whole or
    not at all. Whatever the index says, an entry is returned only if its key and checksum in the shard match.
    The folder is made when something is first written.

    Raises:
        DamagedCacheError: a shard that is damaged.
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
        try:
            self._at(key)
        except KeyError:
            return False
        return True

    def shard_of(self, key: bytes) -> str:
        """Name of the shard that holds an entry; KeyError: no such entry."""
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
            DamagedCacheError: an entry that is not there, has another key, or does not match its checksum.
            ValueError: entries of several shapes.
        """
        stacked: dict[str, Tensor] = {}
        rows: dict[str, np.ndarray] = {}
        layout: Layout = {}
        try:
            places = self._places(keys)
        except KeyError:
            raise DamagedCacheError(
                f"cache {self.folder} is damaged (an entry that was there is not): run `lpl cache verify --delete`, "
                "then run once with --rehash"
            ) from None
        for position, (number, row) in enumerate(places):
            shard = self._shard(number)
            if shard.key(row) != keys[position]:
                raise damaged_file(self.folder / INDEX, f"row {row} of {shard.path.name} is not the entry it says")
            if position == 0:
                layout = shard.layout
                for name, (dtype, shape) in layout.items():
                    stacked[name] = torch.empty((len(keys), *shape), dtype=dtype)
                    rows[name] = stacked[name].view(len(keys), -1).view(torch.uint8).numpy()
            elif shard.layout != layout:
                raise ValueError(f"entries of several shapes: {layout} and {shard.layout}")
            for name, target in rows.items():
                target[position] = shard.row(name, row)
            shard.check(row, [target[position] for target in rows.values()])  # at every read: faster than copying
        return stacked

    def gather_padded(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """The same for entries whose shapes differ in their first dimension at most: see `padded`."""
        layouts = [str(self.layout(key)) if key in self else "" for key in keys]
        if len(set(layouts)) == 1:
            return self.gather(keys)
        rows: list[dict[str, Tensor]] = [{} for _ in keys]
        for layout in dict.fromkeys(layouts):
            places = [place for place, own in enumerate(layouts) if own == layout]
            found = self.gather([keys[place] for place in places])
            for n, place in enumerate(places):
                rows[place] = {name: values[n] for name, values in found.items()}
        return {name: padded([row[name] for row in rows]) for name in rows[0]}

    def write(self, keys: Sequence[bytes], fields: Mapping[str, Tensor], scratch: Path | None = None) -> None:
        """Stores N entries, fields (N, ...), in one new shard, and returns when it is safely on disk.

        `scratch` is as in write_atomically.

        Raises:
            UserError: the folder cannot be written.
            ValueError: keys or fields that cannot be stored.
        """
        if not keys:
            return
        name, content = pack(keys, fields)
        write_cached(self.folder / name, content, scratch)
        if name not in self.shards:
            self._add([name])

    def refresh(self) -> None:
        """Adds shards that other processes have written since; raises DamagedCacheError for a damaged one."""
        there = sorted(_shards_in(self.folder))
        if not self.shards and there:
            found = read_index(self.folder)
            if found is not None and set(found[0]) <= set(there):
                self.shards, self._indexed = found[0], list(found[0])
                self._index = _sorted_index(*found[1:])
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
        write_cached(self.folder / INDEX, buffer.getvalue(), scratch)
        self._indexed = list(self.shards)

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
            at = np.searchsorted(old.prefixes, new.prefixes, side="right")  # merged: mostly few are added to many
            self._index = Index(*(np.insert(a, at, b, axis=0) for a, b in zip(old, new, strict=True)))

    def _places(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """`_at` of many keys."""
        prefixes, own, places = self._index
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        at = np.searchsorted(prefixes, np.ascontiguousarray(wanted[:, :8]).view(np.uint64).ravel())
        at = np.minimum(at, len(own) - 1)
        if len(own) and np.array_equal(own[at], wanted):
            return [(shard, row) for shard, row in places[at].tolist()]
        return [self._at(key) for key in keys]  # one is missing, or two have one prefix

    def _at(self, key: bytes) -> tuple[int, int]:
        """Shard and row of a key; KeyError: it is not there."""
        prefixes, keys, places = self._index
        prefix = np.frombuffer(key, np.uint64, 1)[0]
        at = int(np.searchsorted(prefixes, prefix))
        while at < len(prefixes) and prefixes[at] == prefix:
            if keys[at].tobytes() == key:
                shard, row = places[at].tolist()
                return shard, row
            at += 1
        raise KeyError(key.hex())

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = Shard(self.folder / self.shards[number])
            while len(self._open) > 1 and (
                len(self._open) > OPEN_SHARDS or sum(s.touched for s in self._open.values()) > MAPPED_BYTES
            ):
                self._open.popitem(last=False)
        return shard


def read_index(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """The index of a folder: names of shards, keys (N, 20) and places (N, 2), not compared with the shards themselves.

    None where there is none, or one that is damaged: it says nothing that the shards do not, so they are read instead.
    """
    try:
        with np.load(folder / INDEX, allow_pickle=False) as index:
            shards, keys, places = index["shards"], index["keys"], index["places"]
        sound = (
            shards.dtype.kind == "U"
            and (keys.dtype, keys.shape) == (np.uint8, (len(places), KEY_BYTES))
            and (places.dtype, places.shape) == (np.int32, (len(keys), 2))
            and (places >= 0).all()
            and (places[:, 0] < len(shards)).all()
        )
    except UNZIP_ERRORS:
        return None
    return (shards.tolist(), keys, places) if sound else None


def verify_index(folder: Path) -> None:
    """Compares a folder's index with the shards that it names, which must be sound.

    An index that names shards which are gone is used by nobody, and is no fault.

    Raises:
        DamagedCacheError: it cannot be read, or does not agree with them.
    """
    found = read_index(folder)
    if found is None:
        raise damaged_file(folder / INDEX, "it cannot be read")
    names, keys, places = found
    if not set(names) <= set(_shards_in(folder)):
        return
    held = [Shard(folder / name).keys() for name in names]
    rows = [(number, row) for number, own in enumerate(held) for row in range(len(own))]
    order = np.lexsort((places[:, 1], places[:, 0]))
    true = np.array_equal(places[order], np.array(rows, np.int32).reshape(-1, 2))
    if not true or not np.array_equal(keys[order], np.concatenate([keys[:0], *held])):
        raise damaged_file(folder / INDEX, "it gives entries other places than the shards do")


def _sorted_index(keys: np.ndarray, places: np.ndarray) -> Index:
    prefixes = np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel()
    order = np.argsort(prefixes, kind="stable")
    return Index(prefixes[order], keys[order], places[order].astype(np.int32))


def _shards_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [name for name in os.listdir(folder) if name.endswith(SUFFIX) and not name.startswith(".")]
