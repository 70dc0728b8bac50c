"""Data sets that `datasets` reads, row by row: of the Hub, local folders, saved ones, parquet files.

No code of a data set is run: `datasets` is never told to trust it.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from lpl.base.errors import UserError, require
from lpl.base.files import stamp_of, status_of
from lpl.config import DataConfig
from lpl.data.bad_files import BadImageError, UnreadImageError
from lpl.data.sources.base import (
    PIECE_SIZE,
    Piece,
    Sample,
    Source,
    captions_of,
    cut,
    digest,
    in_hand,
    read_file,
    with_prompt,
)
from lpl.data.sources.remote import download

FAULTS = (DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError, NotImplementedError)
"""What `datasets` raises for data that are missing or damaged."""
_STRINGS = ("string", "large_string", "string_view")
_BINARIES = ("binary", "large_binary", "binary_view")


def open_dataset(name: str, config: DataConfig, cache_dir: str | None) -> Source:
    """The train split of a data set; all rows of parquet files or of a saved data set without splits.

    A sample's id is the number of its row, its stamp the data set's fingerprint, which stays the same from run to run
    for unchanged files of the data set; files that its rows name have versions of their own.

    Raises:
        UserError: no such data set, split or column, or a column of another kind.
    """
    flag, column = f"--dataset_name {name}", config.caption_column
    dataset, stamp = _load_train_split(name, config.dataset_config_name, cache_dir, flag)
    _check_columns(dataset.features, flag, config)
    require(len(dataset) > 0, f"{flag}: its train split is empty")
    size = min(len(dataset), config.max_train_samples or len(dataset))
    # Separate, so that reading a caption does not read the images, and the other way round.
    captions = dataset.select_columns([column]) if column in dataset.features else None
    pictures = {
        picture: dataset.select_columns([picture]).cast_column(picture, Image(decode=False))
        for picture in _picture_columns(config)
    }
    pieces = []
    for start in range(0, size, PIECE_SIZE):
        rows = range(start, min(start + PIECE_SIZE, size))
        own_stamp = digest(stamp, str(rows.start), str(rows.stop))
        samples = partial(_samples_of_rows, pictures, captions, config, rows, stamp)
        pieces.append(Piece(str(start), own_stamp, len(rows), samples))
    return Source(flag, _identity("dataset", name, config), with_prompt(pieces, config.instance_prompt), size)


def _samples_of_rows(
    pictures: Mapping[str, Dataset], captions: Dataset | None, config: DataConfig, rows: range, stamp: str
) -> Generator[Sample, None, None]:
    """Some rows; images are read from the data set when they are asked for."""
    column = config.caption_column
    values: Sequence[Any] = [None] * len(rows)
    if captions is not None:
        values = captions[rows.start : rows.stop][column]
    named = [_named(pictures[picture], picture, rows) for picture in _picture_columns(config)]
    for row, value, *paths in zip(rows, values, *named, strict=True):
        name = f"row {row} of {config.dataset_name}"
        given = captions_of(value, f"--caption_column {column}, {name}", config.instance_prompt)
        read_mask = partial(_read_mask, pictures, row, config) if _uses_masks(config) else None
        files = tuple(filter(None, paths))
        yield Sample(str(row), given, "", stamp, name, partial(_read_image, pictures, row, config), read_mask, files)


def _named(pictures: Dataset, column: str, rows: range) -> list[str | None]:
    """The file or URL that each row names, None if it holds its picture; pictures themselves are not read."""
    stored = pictures.with_format("arrow")[rows.start : rows.stop].column(column)
    held = pc.is_valid(pc.struct_field(stored, "bytes"))
    return pc.if_else(held, None, pc.struct_field(stored, "path")).to_pylist()


def _read_image(pictures: Mapping[str, Dataset], row: int, config: DataConfig) -> bytes:
    return _image_in(pictures[config.image_column][row], config)()


def _read_mask(pictures: Mapping[str, Dataset], row: int, config: DataConfig) -> bytes | None:
    read = _mask_in(pictures[str(config.mask_column)][row], config)
    return None if read is None else read()


def _uses_masks(config: DataConfig) -> bool:
    return config.masked_loss == "files" and config.mask_column is not None


def _picture_columns(config: DataConfig) -> list[str]:
    return [config.image_column, *([str(config.mask_column)] if _uses_masks(config) else [])]


def _image_in(fields: Mapping[str, Any], config: DataConfig) -> Callable[[], bytes]:
    """How to read the image of a row: its bytes, or the file or URL that it names."""
    return _reader(fields[config.image_column] or {}, f"--image_column {config.image_column}")


def _mask_in(fields: Mapping[str, Any], config: DataConfig) -> Callable[[], bytes] | None:
    """How to read the mask of a row likewise; None: it holds none."""
    value = fields[str(config.mask_column)] or {}
    there = value.get("bytes") is not None or value.get("path")
    return _reader(value, f"--mask_column {config.mask_column}") if there else None


def _reader(value: Mapping[str, Any], flag: str) -> Callable[[], bytes]:
    if value.get("bytes") is not None:
        return in_hand(value["bytes"])
    return partial(_read_path, str(value.get("path") or ""), flag)


def _read_path(path: str, column: str) -> bytes:
    if not path:
        raise BadImageError(f"holds no image in {column}")
    buffer = io.BytesIO()
    try:
        if "://" not in path:
            return read_file(path)
        download(path, buffer, "it")
    except UnreadImageError as error:
        raise UnreadImageError(f"names the file {path}, which {error}") from None
    except (UserError, ValueError) as error:
        raise UnreadImageError(f"names the file {path}, which cannot be read ({error})") from None
    return buffer.getvalue()


def _identity(kind: str, name: str, config: DataConfig) -> str:
    """Which data set this is: its place or name, its configuration and the columns."""
    if os.path.exists(name) or _names_parquet(name):
        name = os.path.abspath(name)
    return f"{kind} {name} {config.dataset_config_name} {config.image_column} {config.caption_column}"


def _arguments(name: str, config_name: str | None, flag: str) -> dict[str, Any]:
    """What `datasets` is to load: `path`, `name` and `data_files` of load_dataset.

    The name is one on the Hub, a local folder, a parquet file, or a pattern of such files.
    """
    if os.path.isdir(name) or not _names_parquet(name):
        return {"path": name, "name": config_name}
    require(config_name is None, f"--dataset_config_name {config_name}: parquet files have no configurations: drop it")
    files = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    require(bool(files), f"{flag}: no such file: correct the path")
    # datasets takes names of files for patterns.
    return {"path": "parquet", "data_files": {"train": [glob.escape(os.path.abspath(file)) for file in files]}}


def _names_parquet(name: str) -> bool:
    return name.endswith(".parquet") or glob.has_magic(name)


def _was_saved(folder: str) -> bool:
    """Whether save_to_disk wrote this folder."""
    there = [os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "dataset_info.json")]
    return there[0] or (there[1] and os.path.isfile(os.path.join(folder, "state.json")))


def _cannot_open(flag: str, error: Exception) -> UserError:
    return UserError(
        f"{flag}: cannot be opened ({_reason(error)}): check the name, --dataset_config_name and the network"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _load_train_split(name: str, config_name: str | None, cache_dir: str | None, flag: str) -> tuple[Dataset, str]:
    """The train split, and a stamp that changes with its data."""
    try:
        if not _was_saved(name):
            arguments = _arguments(name, config_name, flag)
            dataset = load_dataset(**arguments, split="train", cache_dir=cache_dir)
            return dataset, str(dataset._fingerprint)
        dataset = _open_saved(name, config_name, flag)
    except FAULTS as error:
        raise _cannot_open(flag, error) from error
    files = [str(file["filename"]) for file in dataset.cache_files]
    return dataset, digest(dataset._fingerprint, *(stamp_of(status_of(file), file) for file in files))


def _open_saved(folder: str, config_name: str | None, flag: str) -> Dataset:
    require(
        config_name is None,
        f"--dataset_config_name {config_name}: {folder} was saved by save_to_disk and has no configurations: drop it",
    )
    saved = load_from_disk(folder)
    if isinstance(saved, DatasetDict):
        require("train" in saved, f"{flag}: no split train; it has: {', '.join(saved)}; save one under that name")
        return saved["train"]
    return saved


def _check_columns(features: Features, flag: str, config: DataConfig) -> None:
    """Refuses columns that are missing, or that hold no images or captions.

    With --instance_prompt, the column of captions may be missing if --caption_column is the default.
    """
    caption_column = config.caption_column
    there = ", ".join(features)
    pictures = dict(zip(("--image_column", "--mask_column"), _picture_columns(config), strict=False))
    captioned = caption_column in features
    may_lack = config.instance_prompt is not None and caption_column == DataConfig.caption_column
    for option, column in pictures.items():
        require(column in features, f"{option} {column}: {flag} has no such column; it has: {there}")
    require(
        captioned or may_lack,
        f"--caption_column {caption_column}: {flag} has no such column; it has: {there}; name another, or give all "
        "images one caption with --instance_prompt",
    )
    for option, column in pictures.items():
        kind = features[column]
        stored = isinstance(kind, Value) and kind.dtype in _STRINGS + _BINARIES
        encoded = isinstance(kind, dict) and {"bytes", "path"} <= set(kind)
        require(
            isinstance(kind, Image) or stored or encoded,
            f"{option} {column}: {flag} holds {kind} there, not images; it has: {there}",
        )
    if not captioned:
        return
    kind = features[caption_column]
    inner = kind.feature if isinstance(kind, List | LargeList) else kind
    require(
        isinstance(inner, Value) and inner.dtype in _STRINGS,
        f"--caption_column {caption_column}: {flag} holds {kind} there, not strings or lists of strings; it has: "
        f"{there}",
    )


def open_stream(name: str, config: DataConfig, cache_dir: str | None) -> Source:
    """The train split of a data set, one piece for each of its own shards, opened when its turn comes.

    A sample's id is the numbers of its shard and of its row in it. Rows that contain an image hold its bytes in memory;
    rows that name a file or URL read it on demand. Errors as in open_dataset.
    """
    flag, identity = f"--dataset_name {name}", _identity("stream", name, config)
    require(
        not _was_saved(name),
        f"--streaming: {flag} was saved by save_to_disk, so it is on this disk already: drop --streaming",
    )
    arguments = _arguments(name, config.dataset_config_name, flag)
    try:
        builder = load_dataset_builder(**arguments, cache_dir=cache_dir)
        dataset = builder.as_streaming_dataset(split="train")
    except FAULTS as error:
        raise _cannot_open(flag, error) from error
    require(
        dataset.features is not None,
        f"--streaming: {flag} does not say what its columns hold before it has been read: drop --streaming",
    )
    _check_columns(dataset.features, flag, config)
    pictures = _picture_columns(config)
    captioned = [config.caption_column] if config.caption_column in dataset.features else []
    dataset = dataset.select_columns([*pictures, *captioned])
    for column in pictures:
        dataset = dataset.cast_column(column, Image(decode=False))
    stamp = digest(identity, *_files_of(builder))
    pieces = []
    for number in range(dataset.num_shards):
        own_stamp = digest(stamp, str(number), str(dataset.num_shards))
        samples = partial(_samples_of_shard, dataset, number, config, own_stamp)
        pieces.append(Piece(str(number), own_stamp, None, samples))
    return Source(flag, identity, cut(with_prompt(pieces, config.instance_prompt), config.max_train_samples))


def _samples_of_shard(
    dataset: IterableDataset, number: int, config: DataConfig, stamp: str
) -> Generator[Sample, None, None]:
    """The rows of one of the data set's shards, in order."""
    for row, fields in enumerate(_rows(dataset, number, config)):
        name = f"row {row} of shard {number} of {config.dataset_name}"
        value = fields.get(config.caption_column)
        captions = captions_of(value, f"--caption_column {config.caption_column}, {name}", config.instance_prompt)
        read_mask = _mask_in(fields, config) if _uses_masks(config) else None
        pictures = (fields[column] or {} for column in _picture_columns(config))
        files = tuple(str(p["path"]) for p in pictures if p.get("bytes") is None and p.get("path"))
        yield Sample(f"{number}/{row}", captions, "", stamp, name, _image_in(fields, config), read_mask, files)


def _rows(dataset: IterableDataset, number: int, config: DataConfig) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.shard(num_shards=dataset.num_shards, index=number)
    except FAULTS as error:
        raise UserError(
            f"--dataset_name {config.dataset_name}: shard {number} cannot be read ({_reason(error)}): check the "
            "network and the data set, then run again"
        ) from error


def _files_of(builder: Any) -> Iterator[str]:
    """The files of the train split with what tells their versions apart: commit, ETag, or time and size."""
    files = (builder.config.data_files or {}).get("train")
    for file, version in zip(files or [], getattr(files, "origin_metadata", None) or [], strict=False):
        yield f"{file} {version} {os.path.getsize(file) if os.path.isfile(file) else ''}"
