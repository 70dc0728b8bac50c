"""From a sample of a source to its row of the catalogue and the crops that are not cached yet, in threads."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

from lpl.config import DataConfig
from lpl.data.bad_files import BadImageError, UnreadImageError
from lpl.data.catalogue import Catalogue, Row
from lpl.data.crops import Crop, render
from lpl.data.decode import decode_with_alpha, parse_color
from lpl.data.masks import Mask, crop_mask, mask_keys, mask_of
from lpl.data.sources import Sample
from lpl.data.sources.remote import Versions

MAX_THREADS = 8
NOTHING = hashlib.sha256(b"").digest()
AHEAD = 2
"""Samples that are read ahead, in addition to one per thread."""

A = TypeVar("A")
B = TypeVar("B")


class Read(NamedTuple):
    """What reading a sample gave."""

    row: Row
    keys: list[bytes]
    """Keys of all its crops."""
    pixels: dict[bytes, Tensor]
    """uint8 (3, H, W), of those that are not cached."""
    mask_keys: list[bytes]
    """Keys of all its crops' masks; none if it has no mask."""
    masks: dict[bytes, Tensor]
    """uint8 (1, h, w), of those that are not cached."""


@dataclass(frozen=True)
class Reader:
    """Reads a sample no further than needed: a known one whose crops are all cached is not opened.

    Attributes:
        crops: every crop of an image by key, from id, digest, width and height.
        config: interpolation, background and masks.
        cached: whether a crop need not be rendered.
        catalogue: what is known of samples; None: read them all again.
        mask_cached: whether the mask of a crop need not be made.
        stride: pixels per latent, for masks.
        versions: of the files that samples name; None: they are not noted.
    """

    crops: Callable[[str, bytes, int, int], dict[bytes, Crop]]
    config: DataConfig
    cached: Callable[[bytes], bool]
    catalogue: Catalogue | None = None
    mask_cached: Callable[[bytes], bool] = lambda _: True
    stride: int = 1
    versions: Versions | None = None

    def __call__(self, sample: Sample) -> Read:
        """Reads one sample; a bad image comes back as a row with the reason."""
        versions = [] if self.versions is None else list(map(self.versions, sample.files))
        row = Row(
            *(sample.id, list(sample.captions), sample.group, sample.name, sample.stamp),
            *(NOTHING, 0, 0, None),  # stays if the sample itself holds no image
            *(list(sample.files) if versions else [], versions),
        )
        known = None if self.catalogue is None else self.catalogue.known(sample.id, sample.stamp, versions)
        if known is not None:
            found = row._replace(**known)
            crops = {} if found.reason else self.crops(sample.id, found.digest, found.width, found.height)
            masks = mask_keys(self.config, found.mask, crops)
            if all(map(self.cached, crops)) and all(map(self.mask_cached, masks)):
                return Read(found, list(crops), {}, list(masks), {})
        try:
            data = sample.read()
            row = row._replace(digest=hashlib.sha256(data).digest())
            image, alpha = decode_with_alpha(data, parse_color(self.config.background_color))
            mask = mask_of(self.config, sample, Mask(row.digest, image), alpha)
        except BadImageError as error:
            digest = b"" if isinstance(error, UnreadImageError) else row.digest
            return Read(row._replace(digest=digest, reason=error.reason), [], {}, [], {})
        row = row._replace(width=image.width, height=image.height, mask=b"" if mask is None else mask.digest)
        crops = self.crops(sample.id, row.digest, image.width, image.height)
        masks = mask_keys(self.config, row.mask, crops)
        way = self.config.image_interpolation_mode
        pixels = {key: render(image, crop, way) for key, crop in crops.items() if not self.cached(key)}
        made = {
            key: crop_mask(mask.image, crop, self.stride)
            for key, crop in masks.items()
            if mask is not None and not self.mask_cached(key)
        }
        return Read(row, list(crops), pixels, list(masks), made)


def threads_of(config: DataConfig) -> int:
    """How many threads read: --dataloader_num_workers, or one for each core up to eight."""
    workers = config.dataloader_num_workers
    return min(MAX_THREADS, os.cpu_count() or 1) if workers == "auto" else int(workers)


def in_order(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """map in threads: results in order, with few of them waiting at a time; 0 threads: in this one."""
    if threads == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="lpl-read") as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= threads + AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
