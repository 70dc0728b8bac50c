"""Lists of shards: what --webdataset names."""

from __future__ import annotations

import glob
import itertools
import logging
import math
import os
import re
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

from lpl.base.errors import UserError, require
from lpl.data.bad_files import UnreadImageError
from lpl.data.sources.base import Piece, Sample, cut, in_hand, with_prompt
from lpl.data.sources.remote import Versions, download
from lpl.data.sources.tar import LeftOut, Span, captions_in, index_tar, read_span

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 1_000_000


def is_url(shard: str) -> bool:
    """Whether a shard is fetched rather than opened."""
    return "://" in shard


def without_secrets(shard: str) -> str:
    """A URL without user, query and fragment, where signatures and tokens are; a path as it is."""
    if not is_url(shard):
        return shard
    url = urlsplit(shard)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()


def list_shards(spec: str) -> list[str]:
    """Paths and URLs that a specification stands for, in its order.

    Args:
        spec: paths or URLs joined by `::`; each may hold {000..099} or {a,b}, a path also * ? [..] and ** (sorted).

    Raises:
        UserError: nothing there, braces that are none, or a shard named twice.
    """
    shards: list[str] = []
    for part in spec.split("::"):
        flag = f"--webdataset {without_secrets(part)}"
        require(part != "", f"--webdataset {without_secrets(spec)}: nothing before or after a ::: name a shard there")
        require(not part.startswith("pipe:"), f"{flag}: no command is run: give the shard's URL or path instead")
        for shard in expand_braces(part, flag):
            shards += [shard] if is_url(shard) else _local(os.path.expanduser(shard), flag)
    missing = [shard for shard in shards if not is_url(shard) and not os.path.isfile(shard)]
    require(
        not missing,
        f"--webdataset {missing[0] if missing else ''}: no such file ({len(missing)} of {len(shards)} shards are "
        "missing): correct the path",
    )
    names = list(map(absolute, shards))
    twice = len(set(names)) < len(names) and next(name for name in names if names.count(name) > 1)
    require(not twice, f"--webdataset {twice}: this shard is named twice: name it once")
    return shards


def _local(path: str, flag: str) -> list[str]:
    require(
        not os.path.isdir(path), f"{flag}: a folder: name its shards, such as {os.path.join(path, '*.tar')}, quoted"
    )
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    require(bool(found), f"{flag}: no file matches: correct the path")
    return found


def expand_braces(text: str, flag: str) -> list[str]:
    """What a text with any number of {first..last} and {one,other} stands for, the last brace running fastest.

    Args:
        text: the text; numbers keep the width of the first one where that begins with 0.
        flag: what to call it in a message.

    Raises:
        UserError: braces that hold neither, or too many shards.
    """
    pieces = _BRACES.split(text)
    choices = [[piece] if n % 2 == 0 else _choices(piece, flag) for n, piece in enumerate(pieces)]
    stray = any(mark in piece for piece in pieces[::2] for mark in "{}")
    require(not stray, f"{flag}: a brace without its other half, or one inside another: write {{000..099}} or {{a,b}}")
    count = math.prod(map(len, choices))
    require(count <= _MOST_SHARDS, f"{flag}: {count} shards; at most {_MOST_SHARDS} can be named: correct the range")
    return list(map("".join, itertools.product(*choices)))


def _choices(inside: str, flag: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        require("," in inside, f"{flag}: {{{inside}}} is no range: write {{000..099}} or {{a,b}}")
        return inside.split(",")
    first, last = bounds.groups()
    require(int(first) <= int(last), f"{flag}: {{{inside}}} runs backwards: write the smaller number first")
    require(int(last) - int(first) < _MOST_SHARDS, f"{flag}: {{{inside}}} is too long a range: correct it")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def absolute(shard: str) -> str:
    """A path from the root on, or a URL without its secrets."""
    return without_secrets(shard) if is_url(shard) else Path(os.path.abspath(os.path.expanduser(shard))).as_posix()


def labels(shards: list[str]) -> list[str]:
    """A short name for each shard: its file's name without .tar, or as much of its path as tells it from the others."""
    paths = [absolute(shard).split("/") for shard in shards]
    folders = zip(*(path[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, folders))
    whole = ["/".join(path[shared:]) for path in paths]
    names = [path[-1].removesuffix(".tar") for path in paths]
    if len(set(names)) == len(names):
        return names
    names = [path.removesuffix(".tar") for path in whole]
    return names if len(set(names)) == len(names) else whole


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
