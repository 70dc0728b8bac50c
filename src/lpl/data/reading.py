"""From a sample of a source to its row of the catalogue and the crops that are not cached yet, in threads."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
"""Samples that are read ahead, beyond one a thread."""

A = TypeVar("A")
B = TypeVar("B")


class Read(NamedTuple):
    """What reading a sample gave."""

    row: Row
    keys: list[bytes]
    """Keys of all its crops."""
    pixels: dict[bytes, Tensor]
    """uint8 (3, H, W) of those that were asked for."""
    mask_keys: list[bytes]
    """Keys of all its crops' masks; none if it has no mask."""
    masks: dict[bytes, Tensor]
    """uint8 (1, h, w) of those that were asked for."""


class Reader:
    """Reads a sample no further than needed: a known one whose crops are all cached is not opened.

    Args:
        crops: every crop of an image by key, from id, digest, width and height.
        config: interpolation and background.
        cached: whether a crop need not be rendered.
        catalogue: what is known of samples; None: read them all again.
        mask_cached: whether the mask of a crop need not be made.
        stride: pixels per latent, for masks.
        versions: of the files that samples name; None: they are not noted.
    """

    def __init__(
        self,
        crops: Callable[[str, bytes, int, int], dict[bytes, Crop]],
        config: DataConfig,
        cached: Callable[[bytes], bool],
        catalogue: Catalogue | None,
        mask_cached: Callable[[bytes], bool] = lambda _: True,
        stride: int = 1,
        versions: Versions | None = None,
    ) -> None:
        self._versions = versions
        self._config, self._mask_cached, self._stride = config, mask_cached, stride
        self._crops, self._cached, self._catalogue = crops, cached, catalogue
        self._background = parse_color(config.background_color)
        self._interpolation = config.image_interpolation_mode

    def __call__(self, sample: Sample) -> Read:
        """Reads one sample; a bad image comes back as a row with the reason."""
        versions = [] if self._versions is None else list(map(self._versions, sample.files))
        known = None if self._catalogue is None else self._catalogue.known(sample.id, sample.stamp, versions)
        if known is not None:
            digest, width, height, reason, mask_digest = known
            crops = {} if reason else self._crops(sample.id, digest, width, height)
            masks = mask_keys(self._config, mask_digest, crops)
            if all(map(self._cached, crops)) and all(map(self._mask_cached, masks)):
                row = _row(sample, versions, digest, width, height, reason, mask_digest)
                return Read(row, list(crops), {}, list(masks), {})
        digest = NOTHING  # of a sample that says itself that it holds no image
        try:
            data = sample.read()
            digest = hashlib.sha256(data).digest()
            image, alpha = decode_with_alpha(data, self._background)
            mask = mask_of(self._config, sample, Mask(digest, image), alpha)
        except BadImageError as error:
            digest = b"" if isinstance(error, UnreadImageError) else digest
            return Read(_row(sample, versions, digest, 0, 0, error.reason), [], {}, [], {})
        crops = self._crops(sample.id, digest, image.width, image.height)
        pixels = {key: render(image, crop, self._interpolation) for key, crop in crops.items() if not self._cached(key)}
        row = _row(sample, versions, digest, image.width, image.height, None)
        if mask is None:
            return Read(row, list(crops), pixels, [], {})
        masks = mask_keys(self._config, mask.digest, crops)
        made = {k: crop_mask(mask.image, crop, self._stride) for k, crop in masks.items() if not self._mask_cached(k)}
        return Read(row._replace(mask=mask.digest), list(crops), pixels, list(masks), made)


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


def _row(
    sample: Sample,
    versions: Sequence[str | None],
    digest: bytes,
    width: int,
    height: int,
    reason: str | None,
    mask: bytes = b"",
) -> Row:
    captions, files = list(sample.captions), list(sample.files) if versions else []
    known = digest, width, height, reason
    return Row(sample.id, captions, sample.group, sample.name, sample.stamp, *known, files, versions, mask)
