"""One file of a store: entries of one shape, stacked, in the safetensors format, mapped into memory."""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lpl.errors import UserError

SUFFIX = ".safetensors"
KEY_BYTES = 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32}
RESERVED = ("keys", "checksums")
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

    Raises:
        UserError: the file is cut short or is no such shard.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
            base = 8 + length
            self.fields = {
                name: Field(DTYPES[entry["dtype"]], tuple(entry["shape"]), base + entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            end = base + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            whole = end == len(self._map) and set(RESERVED) <= self.fields.keys()
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(damaged_shard(path, str(error) or type(error).__name__)) from error
        if not whole:
            raise UserError(damaged_shard(path, f"{len(self._map)} bytes, not {end}"))
        names = sorted(self.fields.keys() - set(RESERVED))
        self.layout: Layout = {name: (self.fields[name].dtype, self.fields[name].shape[1:]) for name in names}
        self.touched = 0

    def keys(self) -> np.ndarray:
        """(N, 20), uint8."""
        return np.frombuffer(self.row_block("keys"), np.uint8).reshape(-1, KEY_BYTES)

    def row(self, name: str, row: int) -> np.ndarray:
        """The bytes of an entry's field, uint8, in the mapped file."""
        field = self.fields[name]
        self.touched += field.row_bytes
        return np.frombuffer(self._map, np.uint8, field.row_bytes, field.offset + row * field.row_bytes)

    def damaged_rows(self) -> list[int]:
        """Rows whose bytes do not give their checksum."""
        wanted = torch.frombuffer(bytearray(self.row_block("checksums")), dtype=torch.int64)
        return [row for row, value in enumerate(wanted.tolist()) if value != self._checksum(row)]

    def row_block(self, name: str) -> bytes:
        """All bytes of a field."""
        field = self.fields[name]
        return self._map[field.offset : field.offset + field.shape[0] * field.row_bytes]

    def _checksum(self, row: int) -> int:
        return checksum([self.row(name, row).data for name in ("keys", *self.layout)])


def pack(keys: Sequence[bytes], fields: Mapping[str, Tensor]) -> bytes:
    """The content of a shard.

    Args:
        keys: N of 20 bytes.
        fields: (N, ...) each.

    Raises:
        ValueError: keys or fields that cannot be stored.
    """
    lengths = {len(tensor) for tensor in fields.values()}
    if lengths != {len(keys)} or any(len(key) != KEY_BYTES for key in keys) or set(RESERVED) & fields.keys():
        raise ValueError(f"cannot store {len(keys)} keys with fields {list(fields)} of lengths {lengths}")
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in fields.items()}
    blocks = [tensors[name].view(len(keys), -1).view(torch.uint8).numpy() for name in sorted(tensors)]
    sums = [checksum([key, *(block[row].data for block in blocks)]) for row, key in enumerate(keys)]
    tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
    tensors["checksums"] = torch.tensor(sums, dtype=torch.int64)
    return save(tensors)


def checksum(parts: Sequence[Any]) -> int:
    """CRC-32 of an entry: its key, then its fields in the order of their names."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def damage(path: Path) -> str | None:
    """What is wrong with a shard, after reading every byte of it; None: nothing."""
    try:
        rows = Shard(path).damaged_rows()
    except UserError as error:
        return str(error)
    return damaged_shard(path, f"{len(rows)} of its entries do not match their checksums") if rows else None


def damaged_shard(path: Path, what: str) -> str:
    """The message of a shard that cannot be used."""
    return (
        f"cache shard {path} is damaged ({what}): `lpl cache verify --delete` removes it, the next run makes it again"
    )
