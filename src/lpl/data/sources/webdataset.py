"""WebDataset's shards: what --webdataset names, and the images and captions in each tar.

At first only the headers of a tar are read, not the data of its members; members of other kinds (.npy, .pth, .pyd, .cls
...) are ignored.
"""

from __future__ import annotations

import glob
import itertools
import logging
import math
import os
import re
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

from lpl.base.errors import UserError, require
from lpl.base.files import stamp_of
from lpl.base.json_files import parse_row
from lpl.base.text import decode
from lpl.config import DataConfig
from lpl.data.bad_files import UnreadImageError
from lpl.data.sources.base import (
    IMAGE_SUFFIXES,
    Piece,
    Sample,
    Source,
    captions_of,
    cut,
    in_hand,
    one_line,
    with_prompt,
)
from lpl.data.sources.listing import PICTURE_SUFFIXES
from lpl.data.sources.remote import Versions, download

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 1_000_000
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_MASK = "mask.png"
"""What follows the key in the name of a mask, after a dot."""

logger = logging.getLogger("lpl")


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

    It joins paths and URLs by `::`; each may hold {000..099} or {a,b}, a path also * ? [..] and ** (sorted).

    Raises:
        UserError: a missing shard, malformed braces, or a shard named twice.
    """
    shards: list[str] = []
    for part in spec.split("::"):
        flag = f"--webdataset {without_secrets(part)}"
        require(part != "", f"--webdataset {without_secrets(spec)}: nothing before or after a ::: name a shard there")
        require(not part.startswith("pipe:"), f"{flag}: no command is run: give the shard's URL or path instead")
        for shard in expand_braces(part, flag):
            shards += [shard] if is_url(shard) else _local(os.path.expanduser(shard), flag)
    missing = [shard for shard in shards if not is_url(shard) and not os.path.isfile(shard)]
    if missing:
        raise UserError(
            f"--webdataset {missing[0]}: no such file ({len(missing)} of {len(shards)} shards are missing): correct "
            "the path"
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
    """What a text with any number of {first..last} and {one,other} stands for, the last brace varying fastest.

    Numbers keep the width of the first one where that begins with 0.

    Raises:
        UserError: braces that hold neither, or too many shards; names `flag`.
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


def open_shards(spec: str, config: DataConfig) -> Source:
    """Shards of WebDataset's layout, one piece each, in the order in which they are named (see list_shards).

    A sample's id is its shard's name and its key. Its captions are in its .json (under --caption_column), or else its
    .txt; its mask is its .mask.png. Keys without an image are left out, and counted in the log.

    Raises:
        UserError: a shard on this machine that is not there.
    """
    parts, shards = spec.split("::"), list_shards(spec)
    versions = Versions({without_secrets(shard): shard for shard in shards if is_url(shard)})
    told: list[str] = []
    named = zip(shards, labels(shards), strict=True)
    pieces = with_prompt(
        [_Shard(shard, label, config, versions, told).piece() for shard, label in named], config.instance_prompt
    )
    return Source(
        "--webdataset " + "::".join(map(without_secrets, parts)),
        f"webdataset {'::'.join(map(absolute, parts))} {config.caption_column}",
        cut(pieces, config.max_train_samples),
        versions=versions,
    )


class _Span(NamedTuple):
    """Where a member's data are, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class _Shard:
    """A tar: a path or URL, its label among the others; `told` holds the shard whose left-out files were logged."""

    shard: str
    label: str
    config: DataConfig
    versions: Versions
    told: list[str]

    @property
    def where(self) -> str:
        return f"--webdataset {without_secrets(self.shard)}"

    def piece(self) -> Piece:
        """The stamp of a URL leaves out its query, which for signed URLs is new each time."""
        if is_url(self.shard):
            return Piece(self.label, without_secrets(self.shard), None, self._fetched)
        try:
            stamp = stamp_of(os.stat(self.shard))
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read ({error.strerror}): correct its permissions") from None
        return Piece(self.label, stamp, None, partial(self._on_disk, stamp))

    def _on_disk(self, stamp: str) -> Generator[Sample, None, None]:
        """Images are read from their place in the tar, at any time and in any order."""
        try:
            with open(self.shard, "rb") as file:
                for sample, image, mask in self._samples(file, stamp):
                    read_mask = None if mask is None else partial(_read_image, self.shard, mask)
                    yield sample._replace(read=partial(_read_image, self.shard, image), read_mask=read_mask)
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read ({error.strerror}): restore it, then run again") from None

    def _fetched(self) -> Generator[Sample, None, None]:
        """Fetches the tar whole to a nameless temporary file, which is gone at the end; samples hold their bytes.

        Each sample names the tar as a file, so that it has a version besides the stamp.
        """
        stamp = without_secrets(self.shard)
        with _temporary_file(self.where) as file:
            self.versions.note(stamp, download(self.shard, file, self.where))
            for sample, image, mask in self._samples(file, stamp):
                read_mask = None if mask is None else in_hand(_read_span(file, mask))
                yield sample._replace(read=in_hand(_read_span(file, image)), read_mask=read_mask, files=(stamp,))

    def _samples(self, file: BinaryIO, stamp: str) -> Iterator[tuple[Sample, _Span, _Span | None]]:
        """Samples that cannot be read yet, and where their images and masks are."""
        keys, left_out = _index(file, self.where)
        if left_out and not self.told:
            self.told.append(self.shard)
            logger.warning("%s: %s; further shards are not reported", self.where, left_out)
        name, masks = os.path.basename(without_secrets(self.shard)), self.config.masked_loss == "files"
        for key, members in keys.items():
            captions = _captions_in(file, members, self.config, f"{self.where}: {key}")
            sample = Sample(f"{self.label}/{key}", captions, self.label, stamp, f"{name}: {key}", bytes)
            yield sample, members["image"], members.get(_MASK) if masks else None


def _temporary_file(shard: str) -> BinaryIO:
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(prefix="lpl-"))
    except OSError as error:
        raise UserError(
            f"{shard}: the folder for temporary files cannot be written ({error.strerror}): name another one with the "
            "environment variable TMPDIR"
        ) from None


def _read_image(path: str, span: _Span) -> bytes:
    try:
        with open(path, "rb") as file:
            return _read_span(file, span)
    except OSError as error:
        raise UnreadImageError(f"cannot be read ({error.strerror})") from None


def _index(file: BinaryIO, shard: str) -> tuple[dict[str, dict[str, _Span]], str]:
    """The members of each key with an image, in the order of their first, and in words what is left out.

    A key is a member's path up to the first dot of its file name, as WebDataset defines it; what follows that dot, in
    any case, says what it is: "image", "txt", "json" or "mask.png". Members of one key need not be neighbours.

    Raises:
        UserError: compressed, damaged or cut short, or two images of one key.
    """
    keys: dict[str, dict[str, _Span]] = {}
    pictures: list[str] = []
    dotted: list[str] = []
    pictured: set[str] = set()
    for name, span in _members(file, shard):
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue
        key = folder + slash + stem
        kind = "image" if f".{extension.lower()}" in IMAGE_SUFFIXES else extension.lower()
        members = keys.setdefault(key, {})
        if kind in ("image", "txt", "json", _MASK):
            require(
                kind not in members,
                f"{shard}: two {'images' if kind == 'image' else f'.{kind} files'} of the key {key}: give each image a "
                "key of its own",
            )
            members[kind] = span
        last = f".{kind.rpartition('.')[2]}"
        if last in PICTURE_SUFFIXES or (last in IMAGE_SUFFIXES and kind != _MASK):
            (pictures if last in PICTURE_SUFFIXES else dotted).append(name)
            pictured.add(key)
    without = [key for key, members in keys.items() if "image" not in members and key not in pictured]
    groups = (
        (without, "keys have no image and are left out"),
        (pictures, "pictures are left out, as their endings are not read: convert them to PNG or JPEG"),
        (
            dotted,
            "images are left out, as their names have further dots, and a key ends at the first: rename those that "
            "are to be trained on",
        ),
    )
    left_out = "; ".join(f"{len(names)} {what} (first: {names[0]})" for names, what in groups if names)
    return {key: members for key, members in keys.items() if "image" in members}, left_out


def _captions_in(file: BinaryIO, members: dict[str, _Span], config: DataConfig, where: str) -> tuple[str, ...]:
    """Captions of an image: of its .json, where that has the key, else of its .txt, which holds one.

    Raises:
        UserError: no captions, or ones that cannot be read.
    """
    keys, column, prompt = "", config.caption_column, config.instance_prompt
    if "json" in members:
        text = decode(_read_span(file, members["json"]), f"{where}.json")
        fields = parse_row(text, f"{where}.json", "make the shard anew")
        if fields.get(column) is not None or (column in fields and "txt" not in members):
            return captions_of(fields[column], f"{where}.json", prompt)
        keys = f" (keys of its .json: {', '.join(fields) or 'none'})"
    if "txt" in members:
        return (one_line(decode(_read_span(file, members["txt"]), f"{where}.txt")),)
    if prompt is not None:
        return (prompt,)
    raise UserError(
        f"{where} has no caption{keys}: put a .txt beside it, name the captions' key in its .json with "
        "--caption_column, or give all images without one the same with --instance_prompt"
    )


def _read_span(file: BinaryIO, span: _Span) -> bytes:
    """The data of a member; raises OSError where the file has become shorter."""
    file.seek(span.offset)
    data = file.read(span.size)
    if len(data) < span.size:
        raise OSError(0, "the shard has become shorter")
    return data


def _members(file: BinaryIO, shard: str) -> Iterator[tuple[str, _Span]]:
    """Names and places of the files in a tar; a hard link has the place of its target."""
    start = file.read(max(map(len, _COMPRESSED)))
    for magic, kind in _COMPRESSED.items():
        require(
            not start.startswith(magic),
            f"{shard}: compressed ({kind}), which makes images no smaller and hides where they are: unpack it to a "
            "plain .tar",
        )
    file.seek(0)
    spans: dict[str, _Span] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is a sparse file")
                if member.isreg():
                    spans[member.name] = _Span(member.offset_data, member.size)
                    yield member.name, spans[member.name]
                elif member.islnk() and member.linkname in spans:
                    yield member.name, spans[member.linkname]
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"{shard}: damaged or cut short ({error}): fetch or make it anew, or leave it out of the list"
        ) from None


def _check_end(file: BinaryIO, offset: int) -> None:
    """Checks that only zeros follow the last member: tarfile stops without an error at a header it cannot read."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("its end mark is missing")
    while block:
        if block.count(0) < len(block):
            raise tarfile.ReadError(f"no header of a member at byte {offset}")
        offset += len(block)
        block = file.read(1 << 20)
