"""Fills the caches with the data of a run, notes which sources are cached whole, and returns the samples."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpl.base.errors import UserError
from lpl.base.files import cache_writing, write_cached
from lpl.base.json_files import TEXT, Shape, difference, object_in
from lpl.base.terminal import progress
from lpl.config import DataConfig
from lpl.data.bad_files import BadFiles
from lpl.data.captions import CaptionRules
from lpl.data.catalogue import PROOF, Samples, bad_in, unsettled
from lpl.data.crops import Views
from lpl.data.dataset import VALIDATION, TrainingData, holding_option, split_repeats, split_samples
from lpl.data.filling import Caches, Encoder, Filler, caption_key
from lpl.data.lock import LOCK, cache_dir, locked
from lpl.data.sources import Piece, Source

logger = logging.getLogger("lpl")

NOTE: Shape = {"shards": [[TEXT]], "catalogue": [TEXT]}


class Mark:
    """A note beside a catalogue that everything a run needs of a source is cached, and in which shards.

    It holds for exactly those files of the catalogue that it was made for, as long as the files that their samples name
    are unchanged. None is made while some files could not be read.
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
        """Whether the note is there; the first process removes one that does not hold."""
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
        """Looks up every entry and makes the note; raises UserError if one that another process encoded is missing."""
        filler = self._filler
        stores = filler.caches.stores
        found: list[set[str]] = [set() for _ in stores]
        try:
            found[1].update(filler.caches.text.shard_of(caption_key(text)) for text in filler.always)
            for table in progress(tables, desc="checking the cache", unit="piece", show=show):
                for row in table.to_pylist():
                    if row["reason"] is None:
                        for store, shards, keys in zip(stores, found, filler.entries(row), strict=False):
                            shards.update(map(store.shard_of, keys))
        except KeyError as error:
            raise _unseen(filler.caches.folder) from error
        names = list(map(sorted, found))
        self._use(names)
        if not any(unsettled(table).any() for table in tables):
            note = json.dumps({"shards": names, "catalogue": _proofs(tables)})
            write_cached(self._path, note.encode(), filler.caches.staging(filler.source))

    def remove(self) -> None:
        """Removes the note until everything has been cached again."""
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


def _unseen(folder: Path) -> UserError:
    """The error of a process that does not find what another one has written."""
    return UserError(
        f"cache {folder} lacks entries that other processes have encoded: name a folder that all of them see with "
        "--latent_cache_dir"
    )


REGULARISATION = "reg/"
"""Put before the ids and folders of regularisation images."""


class Processes(NamedTuple):
    """The processes of a run."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = lambda: None
    """Returns when all have called it."""
    proceed: Callable[[], None] = lambda: None
    """Called between batches and images; raises to stop there, where a later run goes on."""


def prepare_data(
    source: Source,
    regularisation: Source | None,
    config: DataConfig,
    encoder: Encoder,
    seed: int,
    bad_files: Path,
    processes: Processes = Processes(),  # noqa: B008
    show_progress: bool = False,
    validation: Source | None = None,
) -> TrainingData:
    """Encodes what the caches lack and returns the samples, ready to be drawn.

    Every process lists the sources and takes every n-th piece; the cache folder must be one that all of them see. Where
    nothing has changed since an earlier run, no image is opened.

    Args:
        source, regularisation, validation: training images; those of --reg_data_dir and --validation_data_dir.
        seed: seed of the run; crops and what is cached do not depend on it.
        bad_files: where images that cannot be used are listed.
        processes: which one this is; the barrier is called several times.

    Raises:
        UserError: too many bad images, an encoder that makes NaN or Inf, a cache that cannot be used, too little room.
    """
    caches = Caches.open(cache_dir(config), encoder, config.cache_dtype, config.masked_loss != "none")
    views, rules = Views(config), CaptionRules(config, seed)
    bad = BadFiles(config.max_bad_fraction, bad_files)
    parts: list[tuple[list[pa.Table], float, str]] = []
    others = (regularisation, config.prior_loss_weight, REGULARISATION), (validation, 1.0, VALIDATION)
    for part, weight, prefix in ((source, 1.0, ""), *others):
        if part is not None:
            filler = Filler(part, views, rules, encoder, caches, bad, prefix, processes.proceed)
            parts.append((_fill(filler, processes, show_progress), weight, prefix))
    if processes.rank == 0:
        bad.write()
        if bad.found:
            logger.warning("%d images cannot be used and are left out: %s lists them", len(bad.found), bad_files)
    samples = Samples(parts)
    if not len(samples):
        raise none_usable(source, bad_files)
    buckets = views.buckets.assign(samples.sizes[:, 0], samples.sizes[:, 1])
    if processes.rank == 0:
        _warn_upscaled(samples, views, buckets)
    split = split_samples(samples, config, seed)
    if len(split.held_out):
        logger.info(
            "%s: %d samples are held out of training, and %d copies of them left out",
            *(holding_option(config), len(split.held_out), split.copies),
        )
    repeats = split_repeats(samples, split, config)
    return TrainingData(samples, views, rules, caches, seed, buckets, repeats, split)


def none_usable(source: Source, bad_files: Path) -> UserError:
    """The error of a source without a usable image."""
    return UserError(f"{source.name}: no image in it can be used: {bad_files} says why")


def _fill(filler: Filler, processes: Processes, show: bool) -> list[pa.Table]:
    """Fills the caches from one source; returns the rows of its pieces."""
    source, catalogue, caches, bad = filler.source, filler.catalogue, filler.caches, filler.bad
    pieces, staging = list(source.pieces), caches.staging(source)
    mark, own = Mark(pieces, filler), pieces[processes.rank :: processes.size]
    first = processes.rank == 0
    unwritable: UserError | None = None
    # The first process decides and the others follow: two processes need not see the same files of a server.
    whole = first and mark.holds()
    with ExitStack() as stack:
        if first and not whole:
            try:
                stack.enter_context(locked(staging, f"caching {source.name}", processes.proceed))
            except UserError as error:  # no matter, if everything is there
                unwritable, own = error, pieces
            caches.refresh()  # what the run that was waited for has written
            whole = mark.holds()
            if not whole and unwritable is None:
                try:
                    mark.remove()
                except UserError as error:
                    unwritable, own = error, pieces
        processes.barrier()
        if not first:
            caches.refresh()
            whole = mark.is_there()
        processes.barrier()  # nobody writes before all have looked
        if not whole:
            checking = progress(own, desc="checking the cache", unit="piece", show=show)
            lacking = [(piece, absent) for piece in checking if (absent := filler.missing(piece))]
            if unwritable is not None and lacking:
                raise UserError(f"{source.name}: not all of it is cached, and {unwritable}") from unwritable
            if first:
                _check_room(filler, lacking, processes.size)
            bad.begin(source.name, source.size)
            filler.fill([piece for piece, _ in lacking], show)
        processes.barrier()
        if not whole:
            caches.refresh()
        tables = []
        for piece in pieces:
            table = catalogue.find(piece)
            if table is None:
                raise _unseen(caches.folder)
            tables.append(table)
        if first:
            bad.settle(source.name, bad_in(tables), sum(map(len, tables)))
            source.versions.tell(source.name)
            if not whole and unwritable is None:
                for store in caches.stores:
                    store.save_index(scratch=staging)
                _clear(staging)
                mark.make(tables, show)  # last: once it is there, nothing else is checked again
            mark.touch()
            _tell(filler, tables, " by the first process" if processes.size > 1 else "")
        processes.barrier()
    return tables


def _tell(filler: Filler, tables: Sequence[pa.Table], share: str) -> None:
    """Logs what was done and found; `share` says who of several processes did it."""
    source, config, images = filler.source.name, filler.config, sum(map(len, tables))
    logger.info(
        "%s: %d samples; %d crops and %d captions encoded%s, all else was in %s",
        *(source, images, filler.encoded_images, filler.encoded_captions, share, filler.caches.folder),
    )
    if filler.caches.masks is not None:
        usable = [table.column("mask").filter(pc.is_null(table.column("reason"))) for table in tables]
        masked = sum(pc.sum(pc.greater(pc.binary_length(masks), 0)).as_py() or 0 for masks in usable)
        tell = logger.info if masked else logger.warning
        tell(
            "%s: --masked_loss %s: %d of %d images have a mask, the others count whole; %d masks made%s",
            *(source, config.masked_loss, masked, sum(map(len, usable)), filler.made_masks, share),
        )
        if filler.empty_masks:
            logger.warning(
                "%s: %d of the %d masks made leave nothing in their crop: drawing it has the weight %g "
                "(--unmasked_weight); --buckets crops away less",
                *(source, filler.empty_masks, filler.made_masks, config.unmasked_weight),
            )
    prompt = config.instance_prompt
    if prompt is not None and filler.prefix != REGULARISATION:
        served = sum(captions == [prompt] for table in tables for captions in table.column("captions").to_pylist())
        logger.info("%s: --instance_prompt is the caption of %d of %d images", source, served, images)


def _clear(staging: Path) -> None:
    """Removes all but the lock: what killed runs have left, unfinished files included."""
    with cache_writing(staging):
        for left in staging.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()


def _check_room(filler: Filler, todo: Sequence[tuple[Any, int]], processes: int) -> None:
    """Refuses to start filling a disk that has no room for the result.

    The share of this process is taken for that of the others. If a source has been cached without masks, its images
    are read again but need not be encoded again, so they are not counted.
    """
    if filler.catalogue.replaces is not None and filler.catalogue.replaces.is_dir():
        todo = [(piece, absent) for piece, absent in todo if absent >= 0]
    images = sum(filler.views.per_image * (p.size or 0) if absent < 0 else absent for p, absent in todo) * processes
    captions = sum(p.size or 0 for p, absent in todo if absent < 0) * processes
    latents, text = filler.encoder.entry_bytes(*filler.views.buckets.sizes[0])
    variants = filler.config.caption_variants if filler.config.shuffle_caption else 1
    needed = (images * latents + captions * variants * text) * filler.caches.dtype.itemsize // 4
    with cache_writing(filler.caches.folder):
        filler.caches.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(filler.caches.folder).free
    if needed > free:
        raise UserError(
            f"cache {filler.caches.folder}: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB free: "
            "make room there, or name another folder with --latent_cache_dir"
        )


def _warn_upscaled(samples: Samples, views: Views, buckets: Any) -> None:
    targets = np.asarray(views.buckets.sizes)[buckets]
    upscaled = int(((samples.sizes[:, 1] < targets[:, 0]) | (samples.sizes[:, 0] < targets[:, 1])).sum())
    if upscaled:
        logger.warning(
            "%d of %d images are smaller than --resolution %d and are scaled up: they will train blur",
            *(upscaled, len(samples), views.config.crop_size),
        )
