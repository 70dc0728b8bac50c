"""Index of a tar of WebDataset's layout: where in the file the image and the captions of each key are.

Only headers are read, never the data of a member; members of other kinds (.npy, .pth, .pyd, .cls ...) are left alone.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from lpl.base.errors import UserError, require
from lpl.base.json_files import parse_row
from lpl.base.text import decode
from lpl.data.sources.base import IMAGE_SUFFIXES, captions_of, one_line
from lpl.data.sources.listing import PICTURE_SUFFIXES

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
MASK = "mask.png"
"""What stands behind the key in the name of a mask."""


class Span(NamedTuple):
    """Where a member's data are, in bytes."""

    offset: int
    size: int


class Indexed(NamedTuple):
    """An image of a tar and the files that share its key."""

    key: str
    image: Span
    text: Span | None
    json: Span | None
    mask: Span | None


class LeftOut(NamedTuple):
    """What of a tar is no sample."""

    keys: Sequence[str]
    """Keys without an image or a picture."""
    pictures: Sequence[str]
    """Members that are pictures of endings that are not read."""
    dotted: Sequence[str]
    """Members that are images by what follows their last dot, but not by what follows the first."""

    def tell(self) -> str:
        """All that in one line; "" if there is nothing."""
        groups = (
            (self.keys, "keys have no image and are left out"),
            (self.pictures, "pictures are left out, as their endings are not read: convert them to PNG or JPEG"),
            (
                self.dotted,
                "images are left out, as their names have further dots, and a key ends at the first: rename those that "
                "are to be trained on",
            ),
        )
        return "; ".join(f"{len(names)} {what} (first: {names[0]})" for names, what in groups if names)


def index_tar(file: BinaryIO, shard: str) -> tuple[list[Indexed], LeftOut]:
    """The keys with an image, in the order of their first members, and what is left out.

    A key is a member's path up to the first dot of its file name, as WebDataset defines it; what follows that dot, in
    any case, says what it is. Members of one key need not be neighbours.

    Args:
        file: the tar, seekable.
        shard: what to call it in a message.

    Raises:
        UserError: compressed, damaged or cut short, or two images of one key.
    """
    keys: dict[str, dict[str, Span]] = {}
    pictures: list[str] = []
    dotted: list[str] = []
    pictured: set[str] = set()
    for name, span in _members(file, shard):
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue
        kind = "image" if f".{extension.lower()}" in IMAGE_SUFFIXES else extension.lower()
        parts = keys.setdefault(folder + slash + stem, {})
        if kind in ("image", "txt", "json", MASK):
            require(
                kind not in parts,
                f"{shard}: two {'images' if kind == 'image' else f'.{kind} files'} of the key {folder + slash + stem}: "
                "give each image a key of its own",
            )
            parts[kind] = span
        last = f".{kind.rpartition('.')[2]}"
        if last in PICTURE_SUFFIXES or (last in IMAGE_SUFFIXES and kind != MASK):
            (pictures if last in PICTURE_SUFFIXES else dotted).append(name)
            pictured.add(folder + slash + stem)
    found = [
        Indexed(key, parts["image"], parts.get("txt"), parts.get("json"), parts.get(MASK))
        for key, parts in keys.items()
        if "image" in parts
    ]
    without = [key for key, parts in keys.items() if "image" not in parts and key not in pictured]
    return found, LeftOut(without, pictures, dotted)


def captions_in(
    file: BinaryIO, entry: Indexed, caption_column: str, where: str, instance_prompt: str | None = None
) -> tuple[str, ...]:
    """Captions of an image: of its .json, where that has the key, else of its .txt, which holds one.

    Args:
        file: the tar.
        entry: the image.
        caption_column: key of a caption or a list of captions in the .json.
        where: what to call the image in a message.
        instance_prompt: the caption of an image that has none.

    Raises:
        UserError: no captions, or ones that cannot be read.
    """
    keys = ""
    if entry.json is not None:
        fields = parse_row(_text(file, entry.json, f"{where}.json"), f"{where}.json", "make the shard anew")
        if fields.get(caption_column) is not None or (caption_column in fields and entry.text is None):
            return captions_of(fields[caption_column], f"{where}.json", instance_prompt)
        keys = f" (keys of its .json: {', '.join(fields) or 'none'})"
    if entry.text is None and instance_prompt is not None:
        return (instance_prompt,)
    if entry.text is None:
        raise UserError(
            f"{where} has no caption{keys}: put a .txt beside it, name the captions' key in its .json with "
            "--caption_column, or give all images without one the same with --instance_prompt"
        )
    return (one_line(_text(file, entry.text, f"{where}.txt")),)


def read_span(file: BinaryIO, span: Span) -> bytes:
    """The data of a member.

    Raises:
        OSError: the file has become shorter.
    """
    file.seek(span.offset)
    data = file.read(span.size)
    if len(data) < span.size:
        raise OSError(0, "the shard has become shorter")
    return data


def _text(file: BinaryIO, span: Span, where: str) -> str:
    return decode(read_span(file, span), where)


def _members(file: BinaryIO, shard: str) -> Iterator[tuple[str, Span]]:
    """Names and places of the files in a tar; hard links lead to what they link to."""
    start = file.read(max(map(len, _COMPRESSED)))
    for magic, kind in _COMPRESSED.items():
        require(
            not start.startswith(magic),
            f"{shard}: compressed ({kind}), which makes images no smaller and hides where they are: unpack it to a "
            "plain .tar",
        )
    file.seek(0)
    spans: dict[str, Span] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is a sparse file")
                if member.isreg():
                    spans[member.name] = Span(member.offset_data, member.size)
                    yield member.name, spans[member.name]
                elif member.islnk() and member.linkname in spans:
                    yield member.name, spans[member.linkname]
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"{shard}: damaged or cut short ({error}): fetch or make it anew, or leave it out of the list"
        ) from None


def _check_end(file: BinaryIO, offset: int) -> None:
    """tarfile stops without a word at a header it cannot read; only zeros may follow the last member, and must."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("its end mark is missing")
    while block:
        if block.count(0) < len(block):
            raise tarfile.ReadError(f"no header of a member at byte {offset}")
        offset += len(block)
        block = file.read(1 << 20)
