"""Encoded batches that wait on disk until their piece of the source is whole, and then become shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lpl.data.store import TensorStore

SHARD_BYTES = 2**25
"""About how large a shard becomes."""
MASKS_AT_ONCE = 64


class Staging:
    """One piece's entries on their way into a store.

    Each batch is a small file of its own as soon as it is encoded, so a kill loses one batch at most; a restart finds
    the batches there and goes on. Shards are written in the order in which keys were claimed, so the store ends up the
    same, byte for byte, however often the piece was interrupted.

    Args:
        store: where the entries end up.
        folder: where batches wait; one process at a time may use it.
    """

    def __init__(self, store: TensorStore, folder: Path) -> None:
        self._store, self.folder = store, folder
        self._staged = TensorStore(folder)
        self._claimed: dict[bytes, None] = {}

    def __contains__(self, key: bytes) -> bool:
        """Whether an entry need not be encoded: it is in the store, or waits here."""
        return key in self._store or key in self._staged

    def claim(self, key: bytes) -> bool:
        """Takes a key into the piece, unless the store has it; returns whether its entry must be encoded now."""
        if key in self._claimed or key in self._store:
            return False
        self._claimed[key] = None
        return key not in self._staged

    def add(self, keys: Sequence[bytes], fields: Mapping[str, Tensor]) -> None:
        """Keeps an encoded batch, of keys that were claimed."""
        self._staged.write(keys, fields)

    def commit(self) -> None:
        """Moves everything that was claimed into shards of the store, entries of one shape together."""
        by_shape: dict[str, list[bytes]] = {}
        for key in self._claimed:
            by_shape.setdefault(str(self._staged.layout(key)), []).append(key)
        for _, keys in sorted(by_shape.items()):
            rows = max(1, SHARD_BYTES // self._staged.entry_bytes(keys[0]))
            for start in range(0, len(keys), rows):
                part = keys[start : start + rows]
                self._store.write(part, self._staged.gather(part), scratch=self.folder)

    def clear(self) -> None:
        """Removes the batches that waited."""
        shutil.rmtree(self.folder, ignore_errors=True)


class MaskStaging(Staging):
    """Masks on their way into their store: small, so that many of one size wait in memory for a file of theirs."""

    def __init__(self, store: TensorStore, folder: Path) -> None:
        super().__init__(store, folder)
        self._waiting: dict[tuple[int, ...], list[tuple[bytes, Tensor]]] = {}
        self.made = 0
        """Masks taken so far that were not there yet."""
        self.empty = 0
        """Those of them that are 0 everywhere."""

    def take(self, keys: Iterable[bytes], masks: Mapping[bytes, Tensor]) -> None:
        """Claims the masks of a sample's crops and keeps those, (1, h, w), that are missing."""
        for key in keys:
            if self.claim(key):
                self.made += 1
                self.empty += not bool(masks[key].any())
                queue = self._waiting.setdefault(tuple(masks[key].shape), [])
                queue.append((key, masks[key]))
                if len(queue) >= MASKS_AT_ONCE:
                    self._write(queue)

    def flush(self) -> None:
        """Keeps what still waits in memory."""
        for _, queue in sorted(self._waiting.items()):
            self._write(queue)

    def _write(self, queue: list[tuple[bytes, Tensor]]) -> None:
        if queue:
            self.add([key for key, _ in queue], {"mask": torch.stack([mask for _, mask in queue])})
            queue.clear()
