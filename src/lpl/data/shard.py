"""One file of a store: entries of one shape, stacked, in the safetensors format, mapped into memory."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from lpl.base.errors import DamagedCacheError, UnreadCacheError, UserError, on_one_line
from lpl.base.tensor_file import METADATA, parse_header

SUFFIX = ".safetensors"
KEY_BYTES = 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32}
RESERVED = ("keys", "checksums")
NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""Errors of a broken link or a folder: what has the name is no file, and can be removed."""
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of an entry's tensors by field."""


@dataclass(frozen=True)
class Field:
    """Where one tensor of a shard lies: bytes of a row from `offset + row * row_bytes`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one entry."""
        return prod(self.shape[1:]) * self.dtype.itemsize


class Shard:
    """One file, mapped into memory: `keys` (N, 20), `checksums` (N,) and every field stacked, (N, ...).

    Its name is a hash of its keys in the order of its rows and of its layout, so opening a shard verifies which rows
    it holds, and of what shape; `check` verifies the bytes of a row.

    Raises:
        DamagedCacheError: the file is cut short, is no shard, or is not the one of this name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.fields = _fields(self._map)
            self.rows = self.fields["keys"].shape[0]
            names = sorted(self.fields.keys() - set(RESERVED))
            self.layout: Layout = {name: (self.fields[name].dtype, self.fields[name].shape[1:]) for name in names}
            self._keys = self._block("keys")
            self._checksums = np.frombuffer(self._block("checksums"), np.uint64)
        except (OSError, ValueError, LookupError, ArithmeticError, UserError) as error:
            raise unusable_file(path, error) from error
        if path.name != name_of(self._keys, self.layout):
            raise damaged_file(path, "its header or its keys are not those that its name stands for")
        self.touched = 0

    def keys(self) -> np.ndarray:
        """(N, 20), uint8."""
        return np.frombuffer(self._keys, np.uint8).reshape(-1, KEY_BYTES)

    def row(self, name: str, row: int) -> np.ndarray:
        """The bytes of an entry's field, uint8, in the mapped file."""
        field = self.fields[name]
        self.touched += field.row_bytes
        return np.frombuffer(self._map, np.uint8, field.row_bytes, field.offset + row * field.row_bytes)

    def key(self, row: int) -> bytes:
        """The key of a row; empty if there is no such row."""
        return self._keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]

    def check(self, row: int, parts: Sequence[Any]) -> None:
        """Compares an entry that was read (its bytes by field, in the order of the layout) with its checksum."""
        if checksum([self.key(row), *parts]) != self._checksums[row]:
            raise self._damaged(len(self.damaged_rows()))

    def verify(self) -> None:
        """Reads all entries; raises DamagedCacheError if some do not match their checksums."""
        if found := len(self.damaged_rows()):
            raise self._damaged(found)

    def damaged_rows(self) -> list[int]:
        """Rows whose bytes do not match their checksum."""
        return [
            row
            for row, wanted in enumerate(self._checksums.tolist())
            if checksum([self.key(row), *(self.row(name, row) for name in self.layout)]) != wanted
        ]

    def _damaged(self, count: int) -> DamagedCacheError:
        return damaged_file(self.path, f"{count} of its {self.rows} entries do not match their checksums")

    def _block(self, name: str) -> bytes:
        field = self.fields[name]
        return self._map[field.offset : field.offset + self.rows * field.row_bytes]


def _fields(data: mmap.mmap) -> dict[str, Field]:
    """The tensors that a file's header names; UserError: no header; ValueError: not those of a shard, or this file."""
    base = 8 + int.from_bytes(data[:8], "little")
    header = parse_header(data[8:base], "its header")
    fields, end = {}, base
    for name, entry in header.items():
        if name == METADATA:
            continue
        begin, stop = entry["data_offsets"]
        field = fields[name] = Field(DTYPES[entry["dtype"]], tuple(entry["shape"]), base + begin)
        if not field.shape or stop - begin != field.shape[0] * field.row_bytes:
            raise ValueError(f"the shape of {name!r} is not that of its bytes")
        end = max(end, base + stop)
    keys, checksums = (fields[name] for name in RESERVED)
    wanted = ((torch.uint8, (KEY_BYTES,)), (torch.int64, ()))
    if ((keys.dtype, keys.shape[1:]), (checksums.dtype, checksums.shape[1:])) != wanted:
        raise ValueError("no keys and checksums")
    if len({field.shape[0] for field in fields.values()}) != 1:
        raise ValueError("its tensors differ in length")
    if end != len(data):
        raise ValueError(f"{len(data)} bytes, not {end}")
    return fields


def pack(keys: Sequence[bytes], fields: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """The name and the content of a shard: N keys of 20 bytes, fields (N, ...); ValueError if they cannot be stored."""
    lengths = {len(tensor) for tensor in fields.values()}
    if lengths != {len(keys)} or any(len(key) != KEY_BYTES for key in keys) or set(RESERVED) & fields.keys():
        raise ValueError(f"cannot store {len(keys)} keys with fields {list(fields)} of lengths {lengths}")
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in fields.items()}
    layout: Layout = {name: (tensors[name].dtype, tuple(tensors[name].shape[1:])) for name in sorted(tensors)}
    blocks = [tensors[name].view(len(keys), -1).view(torch.uint8).numpy() for name in layout]
    sums = np.array([checksum([key, *(block[row] for block in blocks)]) for row, key in enumerate(keys)], np.uint64)
    joined = b"".join(keys)
    tensors["keys"] = torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(-1, KEY_BYTES)
    tensors["checksums"] = torch.from_numpy(sums.view(np.int64))
    return name_of(joined, layout), save(tensors)


def name_of(keys: bytes, layout: Layout) -> str:
    """The name of the shard that holds these entries, by their keys in the order of its rows, in this layout."""
    fields = [(name, str(dtype), shape) for name, (dtype, shape) in layout.items()]
    return hashlib.blake2b(json.dumps(fields).encode() + keys, digest_size=16).hexdigest() + SUFFIX


def checksum(parts: Sequence[Any]) -> int:
    """XXH3 of an entry: its key, then its fields in the order of their names."""
    found = xxhash.xxh3_64()
    for part in parts:
        found.update(part)
    return int(found.intdigest())


def damaged_file(path: Path, what: str) -> DamagedCacheError:
    """The error of a file of the cache that cannot be used."""
    return DamagedCacheError(
        f"cache file {path} is damaged ({what}): `lpl cache verify --delete` removes it, the next run makes it again"
    )


def unusable_file(path: Path, error: Exception) -> DamagedCacheError:
    """The error for a file of the cache that could not be read now, which need not be damaged."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno not in NO_FILE:
            return UnreadCacheError(
                f"cache file {path}: cannot be read ({os.strerror(error.errno)}): correct its permissions, or name "
                "another folder with --latent_cache_dir"
            )
        return damaged_file(path, os.strerror(error.errno))
    return damaged_file(path, on_one_line(error, 80) or type(error).__name__)
