"""A note that a source is cached whole, so that a run which starts need not look at each image again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from lpl.base.json_files import object_in
from lpl.base.shapes import TEXT, Shape, difference
from lpl.data.catalogue import PROOF, unsettled
from lpl.data.files import cache_writing, write_cached
from lpl.data.filling import Filler, caption_key
from lpl.data.sources import Piece
from lpl.errors import UserError
from lpl.progress import progress

logger = logging.getLogger("lpl")

NOTE: Shape = {"shards": [[TEXT]], "catalogue": [TEXT]}


class Mark:
    """A note beside a catalogue that everything a run needs of a source is cached, and in which shards.

    It holds for the very files of the catalogue that it was made for, as long as files that their samples name are what
    they were. There is none while some files could not be read.
    """

    def __init__(self, pieces: Sequence[Piece], filler: Filler) -> None:
        self._pieces, self._filler = pieces, filler
        names = [filler.catalogue.path(piece).name for piece in pieces]
        caches = filler.caches
        key = [filler.views.settings, filler.rules.settings, filler.always, filler.prefix]
        key += [*(store.folder.name for store in caches.stores), names]
        name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
        self._folder = filler.catalogue.folder
        self._path = self._folder / f"complete-{name}.json"
        self._used = [self._path, *(self._folder / name for name in names)]

    def is_there(self) -> bool:
        """Whether the note is there, as the first process leaves it only where it holds."""
        return not self._filler.config.rehash and self._path.is_file()

    def holds(self) -> bool:
        """Whether the note is there and still true."""
        if not self.is_there():
            return False
        note = object_in(self._path)
        if difference(note, NOTE) is not None:
            return False
        shards, proofs = note["shards"], note["catalogue"]
        stores = self._filler.caches.stores
        if len(shards) != len(stores) or not all(set(n) <= set(s.shards) for n, s in zip(shards, stores, strict=True)):
            return False
        tables = [table for piece in self._pieces if (table := self._filler.catalogue.find(piece)) is not None]
        if _proofs(tables) != proofs or any(unsettled(table).any() for table in tables):
            return False
        self._use(shards)
        return not self._filler.changed(tables)

    def make(self, tables: Sequence[pa.Table], show: bool) -> None:
        """Looks every entry up and makes the note.

        Raises:
            UserError: an entry that another process has encoded is not there.
        """
        filler = self._filler
        found: list[set[str]] = [set() for _ in filler.caches.stores]
        try:
            found[1].update(filler.caches.text.shard_of(caption_key(text)) for text in filler.always)
            for table in progress(tables, desc="checking the cache", unit="piece", show=show):
                for row in table.to_pylist():
                    if row["reason"] is None:
                        crops = filler.crops(row["id"], row["digest"], row["width"], row["height"])
                        texts = filler.texts(row["id"], row["captions"])
                        found[0].update(map(filler.caches.latents.shard_of, crops))
                        found[1].update(filler.caches.text.shard_of(caption_key(text)) for text in texts)
                        if filler.caches.masks is not None:
                            found[2].update(map(filler.caches.masks.shard_of, filler.masks(row, crops)))
        except KeyError as error:
            raise UserError(unseen(filler.caches.folder)) from error
        shards = [sorted(names) for names in found]
        self._use(shards)
        if not any(unsettled(table).any() for table in tables):
            note = json.dumps({"shards": shards, "catalogue": _proofs(tables)})
            write_cached(self._path, note.encode(), filler.caches.staging(filler.source))

    def remove(self) -> None:
        """Takes the note away, until everything has been made again."""
        with cache_writing(self._folder):
            self._path.unlink(missing_ok=True)

    def touch(self) -> None:
        """Marks all files as used now: `lpl cache prune` goes by that."""
        for path in self._used:
            try:
                os.utime(path)
            except FileNotFoundError:  # no note, as some files could not be read
                continue
            except OSError as error:
                logger.warning(
                    "cache file %s is another user's, or cannot be written: `lpl cache prune` may take it for unused",
                    error.filename,
                )
                return

    def _use(self, shards: Sequence[Sequence[str]]) -> None:
        for store, names in zip(self._filler.caches.stores, shards, strict=True):
            self._used += [store.folder / name for name in names]


def _proofs(tables: Sequence[pa.Table]) -> list[str]:
    return [table.schema.metadata[PROOF].hex() for table in tables]


def unseen(folder: Path) -> str:
    """The message where a process does not find what another one has written."""
    return (
        f"cache {folder} lacks entries that other processes have encoded: name a folder that all of them see with "
        "--latent_cache_dir"
    )
