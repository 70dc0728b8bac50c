"""What a source of training images is: pieces in a fixed order, each with samples in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.errors import require
from lpl.data.bad_files import UnreadImageError
from lpl.data.sources.remote import Versions

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".jfif", ".jpe", ".jif", ".jfi", ".apng"
)  # fmt: skip
PIECE_SIZE = 256
"""Samples in a piece of a source that has no shards of its own."""


class Sample(NamedTuple):
    """One image and its captions."""

    id: str
    """Stays the same from run to run, and occurs once in a source."""
    captions: tuple[str, ...]
    """At least one; each may be empty."""
    group: str
    """Folder of the image relative to the root, with /, "" at the root; the shard of a tar; "" for data sets."""
    stamp: str
    """Changes when the image or its captions may have changed."""
    name: str
    """What to call it in a message."""
    read: Callable[[], bytes]
    """Gives the encoded image, in any thread, at least until the iterator that gave the sample moves to another shard
    or is closed; raises BadImageError, UnreadImageError where another attempt may succeed."""
    read_mask: Callable[[], bytes | None] | None = None
    """Gives the encoded mask likewise; None, or if it gives None: there is no mask."""
    files: tuple[str, ...] = ()
    """Files and URLs that it is read from and that its stamp does not cover; Source.versions has their versions."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read in one go."""

    key: str
    """Names the piece within its source, the same from run to run."""
    stamp: str
    """As long as it stays the same, nothing in the piece has changed."""
    size: int | None
    """Number of samples, if known without opening it."""
    samples: Callable[[], Generator[Sample, None, None]]
    """The samples in order; may be called again. A generator: close() frees what it holds. Raises UserError for a
    caption that is missing or no text, or a shard that cannot be read."""


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order, in pieces."""

    name: str
    """What to call it in a message: the flag and its value."""
    identity: str
    """Which source this is: absolute path, name or URL, and the options that decide its ids and captions."""
    pieces: Sequence[Piece]
    size: int | None = None
    """Number of samples; None: not known before all shards have been read."""
    versions: Versions = field(default_factory=Versions)
    """The versions of the files that samples name."""


def captions_of(
    value: Any, where: str, instance_prompt: str | None = None, may_have_prompt: bool = True
) -> tuple[str, ...]:
    """The captions in a field that holds a string, or a list of at least one string.

    Args:
        instance_prompt: the caption where there is none, or an empty list.
        may_have_prompt: whether the source takes an instance prompt; for the message.

    Raises:
        UserError: anything else; names `where`.
    """
    absent = value is None or (isinstance(value, list | tuple) and not value)
    if absent and instance_prompt is not None:
        return (instance_prompt,)
    captions = tuple(value) if isinstance(value, list | tuple) else (value,)
    remedy = "write one" if absent else "correct it"
    prompt = ", or give all images without one the same with --instance_prompt" * (absent and may_have_prompt)
    require(
        bool(captions) and all(isinstance(caption, str) for caption in captions),
        f"{where}: a caption must be a string or a list of strings, not {str(value)[:60]!r}: {remedy}, or name another "
        f"field with --caption_column{prompt}",
    )
    return captions


def one_line(text: str) -> str:
    """A caption file's text, which is one caption: lines stripped, empty ones left out, joined by spaces.

    Differs from kohya's, which takes the first line, and OneTrainer's, which takes one at random: nothing is left out.
    """
    return " ".join(filter(None, map(str.strip, text.split("\n"))))


def read_file(path: str | Path) -> bytes:
    """An image file; raises UnreadImageError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadImageError(f"cannot be read ({error.strerror})") from None


def in_hand(data: bytes) -> Callable[[], bytes]:
    """A `read` for bytes that have been read already."""
    return partial(bytes, data)


def digest(*parts: str) -> str:
    """A short hash of strings and of where each ends."""
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def cut(pieces: Sequence[Piece], count: int | None) -> Sequence[Piece]:
    """The pieces themselves, or one piece with their first `count` samples: only reading them tells where the cut lies.

    Pieces behind the cut are never opened. The stamp covers all pieces.
    """
    if count is None:
        return pieces
    stamp = digest(*(part for piece in pieces for part in (piece.key, piece.stamp)))
    return [Piece(f"first {count}", stamp, None, partial(_first, pieces, count))]


def _first(pieces: Sequence[Piece], left: int) -> Generator[Sample, None, None]:
    for piece in pieces:
        with closing(piece.samples()) as samples:
            for sample in samples:
                yield sample
                left -= 1
                if left == 0:
                    return


def with_prompt(pieces: Sequence[Piece], prompt: str | None) -> Sequence[Piece]:
    """Pieces whose images have the instance prompt where they have no caption of their own.

    It enters the stamp of each piece, so that another prompt reads the captions anew; not that of its samples, so that
    no image is opened again for it.
    """
    return pieces if prompt is None else [replace(piece, stamp=digest(piece.stamp, prompt)) for piece in pieces]
