"""What a source of training images is: pieces in a fixed order, each with samples in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
    """The encoded image, from any thread, at least until the iterator that gave the sample moves to another shard or
    is closed; raises BadImageError, UnreadImageError where another attempt may succeed."""
    read_mask: Callable[[], bytes | None] | None = None
    """Its encoded mask likewise; None, or what gives None: it has none."""
    files: tuple[str, ...] = ()
    """Files and URLs that it is read from and that its stamp does not cover; Source.versions has their versions."""


class Piece(Protocol):
    """A part of a source that is read in one go."""

    @property
    def key(self) -> str:
        """Names the piece within its source, the same from run to run."""
        ...

    @property
    def stamp(self) -> str:
        """Where it is equal to an earlier one, nothing in the piece has changed."""
        ...

    @property
    def size(self) -> int | None:
        """Number of samples, if known without opening it."""
        ...

    def samples(self) -> Generator[Sample, None, None]:
        """The samples in order; may be called again. A generator: close() frees what it holds.

        Raises:
            UserError: a caption that is missing or none, or a shard that cannot be read.
        """
        ...


class Source(Protocol):
    """Samples in a fixed order, in pieces."""

    versions: Versions
    """Of the files that samples name."""

    @property
    def name(self) -> str:
        """What to call it in a message: the flag and its value."""
        ...

    @property
    def identity(self) -> str:
        """Which source this is: absolute path, name or URL, and the options that decide its ids and captions."""
        ...

    @property
    def size(self) -> int | None:
        """Number of samples; None: not known before all shards have been read."""
        ...

    def pieces(self) -> Sequence[Piece]:
        """The pieces in order."""
        ...


def captions_of(
    value: Any, where: str, instance_prompt: str | None = None, may_have_prompt: bool = True
) -> tuple[str, ...]:
    """The captions in a field that holds a string, or a list of at least one string.

    Args:
        value: what the field holds.
        where: what to call the field in a message.
        instance_prompt: what nothing, or an empty list, stands for.
        may_have_prompt: the source takes one.

    Raises:
        UserError: anything else.
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
    """An image file.

    Raises:
        UnreadImageError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadImageError(f"cannot be read ({error.strerror})") from None


def in_hand(data: bytes) -> Callable[[], bytes]:
    """A `read` for bytes that have been read already."""
    return partial(bytes, data)


def digest(*parts: str) -> str:
    """A short hash of strings, each told from the next."""
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class FirstSamples:
    """The first samples of several pieces, as one piece: where the cut lies is known only once they have been read.

    Pieces behind the cut are never opened. The stamp covers all pieces.

    Args:
        pieces: in order.
        count: how many samples at most.
    """

    size = None

    def __init__(self, pieces: Sequence[Piece], count: int) -> None:
        self._pieces, self._count = pieces, count
        self.key = f"first {count}"
        self.stamp = digest(*(part for piece in pieces for part in (piece.key, piece.stamp)))

    def samples(self) -> Generator[Sample, None, None]:
        """See Piece."""
        left = self._count
        for piece in self._pieces:
            samples = piece.samples()
            try:
                for sample in samples:
                    yield sample
                    left -= 1
                    if left == 0:
                        return
            finally:
                if isinstance(samples, Generator):
                    samples.close()


def cut(pieces: Sequence[Piece], count: int | None) -> Sequence[Piece]:
    """The pieces themselves, or one piece with their first `count` samples."""
    return pieces if count is None else [FirstSamples(pieces, count)]


class Prompted:
    """A piece in which images without a caption have the instance prompt.

    That is in the piece's stamp, so that another prompt reads the captions anew; it is not in those of the samples, so
    that no image is opened again for it.

    Args:
        piece: yields the prompt where there is no caption.
        prompt: the instance prompt.
    """

    def __init__(self, piece: Piece, prompt: str) -> None:
        self._piece = piece
        self.key, self.size = piece.key, piece.size
        self.stamp = digest(piece.stamp, prompt)

    def samples(self) -> Generator[Sample, None, None]:
        """See Piece."""
        return self._piece.samples()


def with_prompt(pieces: Sequence[Piece], prompt: str | None) -> Sequence[Piece]:
    """The pieces themselves, or such pieces of them."""
    return pieces if prompt is None else [Prompted(piece, prompt) for piece in pieces]
