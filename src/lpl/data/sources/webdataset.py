"""WebDataset shards: tars on this machine, or at URLs."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import BinaryIO, NamedTuple, cast

from lpl.data.bad_image import UnreadImageError
from lpl.data.sources.base import Piece, Sample, in_hand
from lpl.data.sources.download import download
from lpl.data.sources.first import cut
from lpl.data.sources.prompted import with_prompt
from lpl.data.sources.shards import absolute, is_url, labels, list_shards, without_secrets
from lpl.data.sources.tar import LeftOut, Span, captions_in, index_tar, read_span
from lpl.data.sources.versions import Versions
from lpl.errors import UserError

logger = logging.getLogger("lpl")


class WebDatasetSource:
    """Shards of WebDataset's layout, one piece each, in the order in which they are named.

    A sample's id is its shard's name and its key. Its captions are in its .json (under caption_column), or else its
    .txt. Keys without an image are left out, and counted in the log.

    Args:
        spec: paths and URLs, see shards.list_shards.
        caption_column: key of the captions in the .json of a sample.
        max_samples: use only the first so many samples.
        masks: samples have the masks in their .mask.png.
        instance_prompt: caption of the images that have none; None: there must be no such image.

    Raises:
        UserError: a shard on this machine that is not there.
    """

    size = None

    def __init__(
        self,
        spec: str,
        caption_column: str = "text",
        max_samples: int | None = None,
        masks: bool = False,
        instance_prompt: str | None = None,
    ) -> None:
        self.name = "--webdataset " + "::".join(map(without_secrets, spec.split("::")))
        self.identity = f"webdataset {'::'.join(map(absolute, spec.split('::')))} {caption_column}"
        shards = list_shards(spec)
        self.versions = Versions({without_secrets(shard): shard for shard in shards if is_url(shard)})
        warning = OnceWarning()
        rules = Rules(caption_column, masks, instance_prompt)
        pieces: list[Piece] = []
        for shard, label in zip(shards, labels(shards), strict=True):
            options = shard, label, rules, warning
            pieces.append(RemoteShard(*options, self.versions) if is_url(shard) else LocalShard(*options))
        self._pieces = cut(with_prompt(pieces, instance_prompt), max_samples)

    def pieces(self) -> Sequence[Piece]:
        """The shards; with max_samples, one piece."""
        return self._pieces


class OnceWarning:
    """Says once in a run what of a shard is no sample."""

    def __init__(self) -> None:
        self._lock, self._said = threading.Lock(), False

    def left_out(self, shard: str, found: LeftOut) -> None:
        """Logs what a shard leaves out, unless that of another one has been logged."""
        with self._lock:
            if any(found) and not self._said:
                self._said = True
                logger.warning("%s: %s; further shards go unmentioned", shard, found.tell())


class Rules(NamedTuple):
    """What of a shard's members is used."""

    caption_column: str
    masks: bool
    instance_prompt: str | None


class _Shard:
    """What both kinds of shards share."""

    size = None
    stamp: str

    def __init__(self, shard: str, label: str, rules: Rules, warning: OnceWarning) -> None:
        self._shard, self._rules, self._warning = shard, rules, warning
        self._where = f"--webdataset {without_secrets(shard)}"
        self.key = label

    def _samples(self, file: BinaryIO) -> Iterator[tuple[Sample, Span, Span | None]]:
        """Samples that cannot be read yet, and where their images and masks are."""
        entries, left_out = index_tar(file, self._where)
        self._warning.left_out(self._where, left_out)
        column, masks, prompt = self._rules
        name = os.path.basename(without_secrets(self._shard))
        for entry in entries:
            captions = captions_in(file, entry, column, f"{self._where}: {entry.key}", prompt)
            sample = Sample(f"{self.key}/{entry.key}", captions, self.key, self.stamp, f"{name}: {entry.key}", bytes)
            yield sample, entry.image, entry.mask if masks else None


class LocalShard(_Shard):
    """A tar on this machine: images are read from their place in it, at any time and in any order."""

    def __init__(self, shard: str, label: str, rules: Rules, warning: OnceWarning) -> None:
        super().__init__(shard, label, rules, warning)
        try:
            status = os.stat(shard)
        except OSError as error:
            raise UserError(f"{self._where}: cannot be read ({error.strerror}): correct its permissions") from None
        self.stamp = f"{status.st_size:x}.{status.st_mtime_ns:x}"

    def samples(self) -> Generator[Sample, None, None]:
        """See Piece; the headers of the tar are read first."""
        try:
            with open(self._shard, "rb") as file:
                for sample, image, mask in self._samples(file):
                    read_mask = None if mask is None else partial(_read_image, self._shard, mask)
                    yield sample._replace(read=partial(_read_image, self._shard, image), read_mask=read_mask)
        except OSError as error:
            raise UserError(f"{self._where}: cannot be read ({error.strerror}): restore it, then run again") from None


class RemoteShard(_Shard):
    """A tar at a URL: fetched whole to a nameless temporary file, which is gone when samples() ends or is closed.

    Samples hold their image's bytes. The stamp is the URL without its query, which for signed URLs is new each time; as
    a file that each sample names, it has a version besides.
    """

    def __init__(self, shard: str, label: str, rules: Rules, warning: OnceWarning, versions: Versions) -> None:
        super().__init__(shard, label, rules, warning)
        self.stamp, self._versions = without_secrets(shard), versions

    def samples(self) -> Generator[Sample, None, None]:
        """See Piece; the shard is fetched first."""
        with _temporary_file(self._where) as file:
            self._versions.note(self.stamp, download(self._shard, file, self._where))
            for sample, image, mask in self._samples(file):
                read_mask = None if mask is None else in_hand(read_span(file, mask))
                image_bytes = in_hand(read_span(file, image))
                yield sample._replace(read=image_bytes, read_mask=read_mask, files=(self.stamp,))


@contextmanager
def _temporary_file(shard: str) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(prefix="lpl-"))
        except OSError as error:
            raise UserError(
                f"{shard}: the folder for temporary files cannot be written ({error.strerror}): name another one with "
                "the environment variable TMPDIR"
            ) from None
        yield cast(BinaryIO, file)


def _read_image(path: str, span: Span) -> bytes:
    try:
        with open(path, "rb") as file:
            return read_span(file, span)
    except OSError as error:
        raise UnreadImageError(f"cannot be read ({error.strerror})") from None
