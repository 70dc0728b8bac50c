"""What is known of a source's samples without reading them again: a file of columns for each piece of the source."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from lpl.base.files import write_cached
from lpl.data.bad_files import Bad
from lpl.data.shard import damaged_file, unusable_file
from lpl.data.sources import Piece, Source

SUFFIX = ".arrow"
FORMAT = "-3"
"""Part of what the folders of catalogues and stores are named for: it changes with the layout of files, and with how
an image file or caption becomes what is cached."""
PROOF, PILLOW = b"proof", b"pillow"
"""Metadata of a table: the checksum of its file, and the version of the library that decoded the images."""
PROOF_BYTES = 16
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("group", pa.string()),
        ("name", pa.string()),
        ("stamp", pa.string()),
        ("digest", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reason", pa.string()),
        ("files", pa.list_(pa.string())),
        ("versions", pa.list_(pa.string())),
    ]
)
KNOWN = ("digest", "width", "height", "reason", "mask")
MASKED = SCHEMA.append(pa.field("mask", pa.binary()))
"""The columns where masks are in use; runs without them keep their catalogues."""


class Row(NamedTuple):
    """A sample as the catalogue knows it."""

    id: str
    captions: list[str]
    group: str
    name: str
    stamp: str
    digest: bytes
    """sha256 of the encoded image; empty if it could not be read."""
    width: int
    height: int
    """Size once upright, in pixels; 0 if the image is bad."""
    reason: str | None
    """Why the image cannot be used; None if it can."""
    files: Sequence[str] = ()
    """See Sample."""
    versions: Sequence[str | None] = ()
    """The version of each of them before it was read; None: unknown."""
    mask: bytes = b""
    """sha256 of the file that holds its mask; empty: none, or masks are not in use."""


class Catalogue:
    """The files of one source, in a folder of the cache named for it and for where its masks are from (mask_source).

    A file is named for its piece and the piece's stamp, so a changed piece has another file, and the old one still
    tells what was known of the samples that have not changed. After the table the file holds a checksum of itself and
    its name.
    """

    def __init__(self, cache: Path, source: Source, masks: str = "") -> None:
        plain, own = (
            cache / "catalogues" / hashlib.blake2b(f"{name}{FORMAT}".encode(), digest_size=16).hexdigest()
            for name in (source.identity, source.identity + masks)
        )
        self.folder, self.schema = own, MASKED if masks else SCHEMA
        self.replaces = plain if masks else None
        """With masks, the folder for the same source without them."""
        self._tables: list[pa.Table] = []
        self._unsettled: list[np.ndarray] = []
        self.forget_known()

    def path(self, piece: Piece) -> Path:
        """The file of a piece."""
        name = hashlib.blake2b(f"{piece.key}\0{piece.stamp}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}{SUFFIX}"

    def find(self, piece: Piece) -> pa.Table | None:
        """The rows of a piece, mapped into memory; None if the piece is new or has changed (but see Versions.differ).

        Raises:
            DamagedCacheError: the file is damaged.
        """
        path = self.path(piece)
        return read_table(path, self.schema) if path.is_file() else None

    def write(self, piece: Piece, rows: Sequence[Row], scratch: Path | None = None) -> None:
        """Stores the rows of a piece, and returns when they are safely on disk; scratch as in write_atomically.

        Raises:
            UserError: the folder cannot be written.
        """
        buffer, path = io.BytesIO(), self.path(piece)
        schema = self.schema.with_metadata({PILLOW: PIL.__version__.encode()})
        with pa.ipc.new_file(buffer, schema) as file:
            file.write_table(table_of(rows, schema))
        content = buffer.getvalue()
        write_cached(path, content + _proof(path, content), scratch)

    def load_known(self) -> None:
        """Gathers what the files of the source say of its samples, for `known`; the one last used comes first.

        Takes 16 bytes a sample; the rest stays in the mapped files.
        """
        there = filter(Path.is_file, self.folder.glob(f"[!.]*{SUFFIX}"))  # no broken link
        paths = sorted(there, key=lambda path: (-path.stat().st_mtime_ns, path.name))
        self._tables = [read_table(path, self.schema) for path in paths]
        self._unsettled = list(map(unsettled, self._tables))
        hashes, places = [np.empty(0, np.int64)], [np.empty((0, 2), np.int32)]
        for number, table in enumerate(self._tables):
            pairs = zip(table.column("id").to_pylist(), table.column("stamp").to_pylist(), strict=True)
            hashes.append(np.fromiter(map(hash, pairs), np.int64, len(table)))
            places.append(np.stack([np.full(len(table), number, np.int32), np.arange(len(table), dtype=np.int32)], 1))
        found = np.concatenate(hashes)
        order = np.argsort(found, kind="stable")
        self._hashes, self._places = found[order], np.concatenate(places)[order]

    def known(self, sample: str, stamp: str, versions: Sequence[str | None]) -> dict[str, Any] | None:
        """The columns KNOWN of a sample that any piece had with this stamp and these versions; only after load_known.

        None also if the row is `unsettled`.
        """
        names = [name for name in self.schema.names if name in ("id", "stamp", "versions", *KNOWN)]
        wanted = hash((sample, stamp))
        first, end = (int(np.searchsorted(self._hashes, wanted, side)) for side in ("left", "right"))
        for number, row in self._places[first:end].tolist():
            found = {name: self._tables[number].column(name)[row].as_py() for name in names}
            same = (found["id"], found["stamp"], found["versions"]) == (sample, stamp, list(versions))
            if same and not self._unsettled[number][row]:
                return {name: found[name] for name in names if name in KNOWN}
        return None

    def forget_known(self) -> None:
        """Frees what load_known has gathered."""
        self._tables, self._unsettled = [], []
        self._hashes, self._places = np.empty(0, np.int64), np.empty((0, 2), np.int32)


class Samples:
    """The usable samples of one or several sources, by number; columns stay in the mapped files.

    Args:
        sources: for each, the rows of its pieces in order; the loss weight of its samples; and the prefix of their ids
            and groups, which tells samples of two sources apart.
    """

    def __init__(self, sources: Iterable[tuple[Sequence[pa.Table], float, str]]) -> None:
        parts = [(table, weight, prefix) for tables, weight, prefix in sources for table in tables]
        self._tables = [[_whole(column) for column in table.columns] for table, _, _ in parts]
        self._weights, self._prefixes = [weight for _, weight, _ in parts], [prefix for _, _, prefix in parts]
        self.weighted = any(weight != 1.0 for weight in self._weights)
        """Whether any sample has another loss weight than 1."""
        pieces, rows, sizes = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [np.empty((0, 2), np.int32)]
        for number, (table, _, _) in enumerate(parts):
            usable = np.flatnonzero(_whole(table.column("reason")).is_null().to_numpy(zero_copy_only=False))
            pieces.append(np.full(len(usable), number, np.int32))
            rows.append(usable.astype(np.int32))
            columns = [table.column(name).to_numpy()[usable] for name in ("width", "height")]
            sizes.append(np.stack(columns, 1).astype(np.int32))
        self._piece, self._row, self.sizes = np.concatenate(pieces), np.concatenate(rows), np.concatenate(sizes)
        """`sizes`: (N, 2), width and height of each upright image, in pixels."""

    def __len__(self) -> int:
        """Number of usable samples."""
        return len(self._row)

    def __getitem__(self, index: int) -> Row:
        """What is known of a sample."""
        piece = int(self._piece[index])
        row = Row(*(column[int(self._row[index])].as_py() for column in self._tables[piece]))
        prefix = self._prefixes[piece]
        return row._replace(id=prefix + row.id, group=prefix + row.group) if prefix else row

    def piece(self, index: int) -> int:
        """Number of the table that a sample is in."""
        return int(self._piece[index])

    def weight(self, index: int) -> float:
        """Loss weight of a sample."""
        return self._weights[int(self._piece[index])]

    def prefixes(self) -> np.ndarray:
        """The prefix of the id of each sample, (N,)."""
        return np.asarray(self._prefixes)[self._piece]

    def digests(self) -> list[bytes]:
        """sha256 of each sample's image file."""
        place = SCHEMA.get_field_index("digest")
        return [digest for columns, rows in self._by_table() for digest in columns[place].take(rows).to_pylist()]

    def captions(self) -> Iterator[list[str]]:
        """The captions of each sample, in order."""
        place = SCHEMA.get_field_index("captions")
        return (captions for columns, rows in self._by_table() for captions in columns[place].take(rows).to_pylist())

    def groups(self) -> tuple[list[str], np.ndarray]:
        """The groups there are, and which of them each sample is in, (N,)."""
        names: dict[str, int] = {}
        codes = [np.empty(0, np.int32)]
        for prefix, (columns, rows) in zip(self._prefixes, self._by_table(), strict=True):
            encoded = columns[SCHEMA.get_field_index("group")].dictionary_encode()
            own = [names.setdefault(prefix + str(group), len(names)) for group in encoded.dictionary.to_pylist()]
            codes.append(np.asarray(own, np.int32)[encoded.indices.take(rows).to_numpy(zero_copy_only=False)])
        return list(names), np.concatenate(codes)

    def _by_table(self) -> Iterator[tuple[list[pa.Array], pa.Array]]:
        """The columns of each table, and which of its rows are samples."""
        bounds = np.searchsorted(self._piece, np.arange(len(self._tables) + 1))
        for columns, start, end in zip(self._tables, bounds, bounds[1:], strict=False):
            yield columns, pa.array(self._row[start:end])

    def digest(self) -> str:
        """A hash of all ids, captions and image contents, in order: what a resumed run must find again."""
        found = hashlib.blake2b(digest_size=16)
        for columns in self._tables:
            for name in ("id", "captions", "digest", "reason", *MASKED.names[len(SCHEMA) : len(columns)]):
                for part in _flat(columns[MASKED.get_field_index(name)]):
                    found.update(part)
        return found.hexdigest()


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; not copied where it is one already, as in the mapped files."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def table_of(rows: Sequence[Row], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows as a table of SCHEMA or MASKED, in one chunk."""
    columns = zip(*rows, strict=True) if rows else [[] for _ in Row._fields]
    arrays = [pa.array(list(c), field.type) for c, field in zip(columns, schema, strict=False)]
    return pa.Table.from_batches([pa.record_batch(arrays, schema=schema)])


def _flat(column: pa.Array) -> Iterator[Any]:
    for buffer in pa.concat_arrays([column]).buffers():
        if buffer is not None:
            yield memoryview(buffer)


def bad_in(tables: Sequence[pa.Table]) -> list[Bad]:
    """The samples that cannot be used."""
    found = (table.filter(pc.is_valid(table.column("reason"))).select(Bad._fields) for table in tables)
    return [Bad(**row) for part in found for row in part.to_pylist()]


def unsettled(table: pa.Table) -> np.ndarray:
    """Which rows must be read again, (N,): the file could not be read, or another Pillow could not decode it."""
    bad = table.column("reason").is_valid()
    if table.column("reason").null_count == len(table):
        return np.zeros(len(table), bool)
    if table.schema.metadata[PILLOW] == PIL.__version__.encode():
        bad = pc.and_(bad, pc.equal(pc.binary_length(table.column("digest")), 0))
    return np.asarray(bad.to_numpy())


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The table of a file, mapped into memory, with its checksum among the schema's metadata.

    Raises:
        DamagedCacheError: it is not what was written under this name.
    """
    try:
        with pa.memory_map(str(path)) as file:
            whole = file.read_buffer()
        if whole.size < PROOF_BYTES:
            raise OSError("cut short")
        content, proof = whole.slice(0, whole.size - PROOF_BYTES), whole.slice(whole.size - PROOF_BYTES).to_pybytes()
        if _proof(path, content) != proof:
            raise OSError("it does not match its checksum")
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise unusable_file(path, error) from error
    if schema is not None and table.schema != schema:
        raise damaged_file(path, "its columns are not those of its source")
    return table.replace_schema_metadata({**(table.schema.metadata or {}), PROOF: proof})


def _proof(path: Path, content: Any) -> bytes:
    found = xxhash.xxh3_128(path.stem.encode())
    found.update(content)
    return bytes(found.digest())
