"""Data sets that `datasets` reads, row by row: of the Hub, local folders, saved ones, parquet files.

No code of a data set is run: `datasets` is never told to trust it.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Generator, Iterator, Sequence
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
from lpl.data.sources.base import PIECE_SIZE, Piece, Sample, captions_of, cut, digest, in_hand, read_file, with_prompt
from lpl.data.sources.remote import Versions, download

FAULTS = (DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError, NotImplementedError)
"""What `datasets` raises for data that are missing or damaged."""
_STRINGS = ("string", "large_string", "string_view")
_BINARIES = ("binary", "large_binary", "binary_view")


class HubSource:
    """The train split of a data set; all rows of parquet files or of a saved data set without splits.

    A sample's id is the number of its row, its stamp the data set's fingerprint, which stays the same from run to run
    for unchanged files of the data set; those that its rows name have versions of their own.

    Raises:
        UserError: no such data set, split or column, or a column of another kind.
    """

    def __init__(self, config: DataConfig, cache_dir: str | None) -> None:
        assert config.dataset_name is not None
        self.name = f"--dataset_name {config.dataset_name}"
        self.identity, self.versions = identity_of("dataset", config), Versions()
        dataset, stamp = _load_train_split(config.dataset_name, config.dataset_config_name, cache_dir, self.name)
        check_columns(dataset.features, self.name, config)
        require(len(dataset) > 0, f"{self.name}: its train split is empty")
        self.size: int | None = min(len(dataset), config.max_train_samples or len(dataset))
        # Apart, so that reading a caption leaves the images alone, and the other way round.
        images = dataset.select_columns([config.image_column])
        images = images.cast_column(config.image_column, Image(decode=False))
        captions = (
            dataset.select_columns([config.caption_column]) if config.caption_column in dataset.features else None
        )
        column = mask_column(config)
        masks = None
        if column is not None:
            masks = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        pieces = [
            RowsPiece(images, captions, masks, config, range(start, min(start + PIECE_SIZE, self.size)), stamp)
            for start in range(0, self.size, PIECE_SIZE)
        ]
        self._pieces = with_prompt(pieces, config.instance_prompt)

    def pieces(self) -> Sequence[Piece]:
        """Slices of the rows."""
        return self._pieces


class RowsPiece:
    """Some rows of a data set."""

    def __init__(
        self,
        images: Dataset,
        captions: Dataset | None,
        masks: Dataset | None,
        config: DataConfig,
        rows: range,
        stamp: str,
    ) -> None:
        self._images, self._captions, self._masks = images, captions, masks
        self._config, self._rows, self._stamp = config, rows, stamp
        self.key = str(rows.start)
        self.stamp = digest(stamp, str(rows.start), str(rows.stop))
        self.size: int | None = len(rows)

    def samples(self) -> Generator[Sample, None, None]:
        """The rows; images are read from the data set when they are asked for."""
        column, prompt = self._config.caption_column, self._config.instance_prompt
        values: Sequence[Any] = [None] * len(self._rows)
        if self._captions is not None:
            values = self._captions[self._rows.start : self._rows.stop][column]
        named = [self._named(self._images, self._config.image_column)]
        if self._masks is not None:
            named.append(self._named(self._masks, str(self._config.mask_column)))
        for row, value, *paths in zip(self._rows, values, *named, strict=True):
            name = f"row {row} of {self._config.dataset_name}"
            captions = captions_of(value, f"--caption_column {column}, {name}", prompt)
            read_mask = None if self._masks is None else partial(self._read_mask, row)
            files = tuple(filter(None, paths))
            yield Sample(str(row), captions, "", self._stamp, name, partial(self._read, row), read_mask, files)

    def _named(self, pictures: Dataset, column: str) -> list[str | None]:
        """The file or URL that each row names, None if it holds its picture; pictures themselves are not read."""
        stored = pictures.with_format("arrow")[self._rows.start : self._rows.stop].column(column)
        held = pc.is_valid(pc.struct_field(stored, "bytes"))
        return pc.if_else(held, None, pc.struct_field(stored, "path")).to_pylist()

    def _read(self, row: int) -> bytes:
        column = self._config.image_column
        return reader(self._images[row][column], column)()

    def _read_mask(self, row: int) -> bytes | None:
        column = self._config.mask_column
        assert self._masks is not None
        assert column is not None
        read = mask_reader(self._masks[row][column], column)
        return None if read is None else read()


def mask_column(config: DataConfig) -> str | None:
    """The column with masks, if they are in use."""
    return config.mask_column if config.masked_loss == "files" else None


def mask_reader(value: Any, column: str) -> Callable[[], bytes] | None:
    """How to read the mask that a row holds, as `reader`; None: it holds none."""
    there = value is not None and (value.get("bytes") is not None or value.get("path"))
    return reader(value, column, "mask_column") if there else None


def reader(value: Any, column: str, option: str = "image_column") -> Callable[[], bytes]:
    """How to read the image that a row holds: its bytes, or the file or URL that it names.

    Args:
        value: a dict of `bytes` and `path`, or None.
        column: name of the column.
        option: which option names it.
    """
    image = value or {}
    if image.get("bytes") is not None:
        return in_hand(image["bytes"])
    return partial(_read_path, str(image.get("path") or ""), f"--{option} {column}")


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


def identity_of(kind: str, config: DataConfig) -> str:
    """Which data set a configuration names: its place or name, its configuration and the columns."""
    name = str(config.dataset_name)
    if os.path.exists(name) or _names_parquet(name):
        name = os.path.abspath(name)
    return f"{kind} {name} {config.dataset_config_name} {config.image_column} {config.caption_column}"


def arguments_of(name: str, config_name: str | None, flag: str) -> dict[str, Any]:
    """What `datasets` is to load: `path`, `name` and `data_files` of load_dataset.

    Args:
        name: a name on the Hub, a local folder, a parquet file, or a pattern of such files.
        config_name: the configuration.
        flag: what to call the data set in a message.

    Raises:
        UserError: no such parquet files, or a configuration of something that has none.
    """
    if os.path.isdir(name):
        return {"path": name, "name": config_name}
    if not _names_parquet(name):
        return {"path": name, "name": config_name}
    require(config_name is None, f"--dataset_config_name {config_name}: parquet files have no configurations: drop it")
    files = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    require(bool(files), f"{flag}: no such file: correct the path")
    # datasets takes names of files for patterns.
    return {"path": "parquet", "data_files": {"train": [glob.escape(os.path.abspath(file)) for file in files]}}


def _names_parquet(name: str) -> bool:
    return name.endswith(".parquet") or glob.has_magic(name)


def was_saved(folder: str) -> bool:
    """Whether save_to_disk wrote this folder."""
    there = [os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "dataset_info.json")]
    return there[0] or (there[1] and os.path.isfile(os.path.join(folder, "state.json")))


def cannot_open(flag: str, error: Exception) -> UserError:
    """The message for a data set that `datasets` does not open."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{flag}: cannot be opened ({reason}): check the name, --dataset_config_name and the network")


def _load_train_split(name: str, config_name: str | None, cache_dir: str | None, flag: str) -> tuple[Dataset, str]:
    """The train split, and a stamp that changes with its data."""
    try:
        if not was_saved(name):
            arguments = arguments_of(name, config_name, flag)
            dataset = load_dataset(**arguments, split="train", cache_dir=cache_dir)
            return dataset, str(dataset._fingerprint)
        dataset = _open_saved(name, config_name, flag)
    except FAULTS as error:
        raise cannot_open(flag, error) from error
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


def check_columns(features: Features, flag: str, config: DataConfig) -> None:
    """Refuses columns that are missing, or that hold no images or captions.

    With --instance_prompt there need be no column of captions, unless another than the default is asked for.

    Raises:
        UserError: such a column.
    """
    caption_column, masks = config.caption_column, mask_column(config)
    there = ", ".join(features)
    pictures = {"--image_column": config.image_column} | ({} if masks is None else {"--mask_column": masks})
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


class StreamSource:
    """The train split of a data set, one piece for each of its own shards, opened when its turn comes.

    A sample's id is the numbers of its shard and of its row in it. Rows with an image in place hold its bytes in hand;
    rows that name a file or URL read that when asked.

    Raises:
        UserError: no such data set, split or column, or a column of another kind.
    """

    size = None

    def __init__(self, config: DataConfig, cache_dir: str | None) -> None:
        assert config.dataset_name is not None
        self.name = f"--dataset_name {config.dataset_name}"
        self.identity, self.versions = identity_of("stream", config), Versions()
        require(
            not was_saved(config.dataset_name),
            f"--streaming: {self.name} was saved by save_to_disk, so it is on this disk as it is: drop --streaming",
        )
        arguments = arguments_of(config.dataset_name, config.dataset_config_name, self.name)
        try:
            builder = load_dataset_builder(**arguments, cache_dir=cache_dir)
            dataset = builder.as_streaming_dataset(split="train")
        except FAULTS as error:
            raise cannot_open(self.name, error) from error
        require(
            dataset.features is not None,
            f"--streaming: {self.name} does not say what its columns hold before it has been read: drop --streaming",
        )
        check_columns(dataset.features, self.name, config)
        masks = mask_column(config)
        pictures = [config.image_column, *([] if masks is None else [masks])]
        captioned = [config.caption_column] if config.caption_column in dataset.features else []
        dataset = dataset.select_columns([*pictures, *captioned])
        for column in pictures:
            dataset = dataset.cast_column(column, Image(decode=False))
        stamp = digest(self.identity, *_files_of(builder))
        pieces = [ShardPiece(dataset, number, config, stamp) for number in range(dataset.num_shards)]
        self._pieces = cut(with_prompt(pieces, config.instance_prompt), config.max_train_samples)

    def pieces(self) -> Sequence[Piece]:
        """The data set's shards; with --max_train_samples, one piece."""
        return self._pieces


class ShardPiece:
    """One shard of a data set."""

    size = None

    def __init__(self, dataset: IterableDataset, number: int, config: DataConfig, stamp: str) -> None:
        self._dataset, self._number, self._config = dataset, number, config
        self.key = str(number)
        self.stamp = digest(stamp, str(number), str(dataset.num_shards))

    def samples(self) -> Generator[Sample, None, None]:
        """The rows in order."""
        config = self._config
        for row, fields in enumerate(self._rows()):
            name = f"row {row} of shard {self._number} of {config.dataset_name}"
            value = fields.get(config.caption_column)
            captions = captions_of(value, f"--caption_column {config.caption_column}, {name}", config.instance_prompt)
            read = reader(fields[config.image_column], config.image_column)
            masks = mask_column(config)
            read_mask = None if masks is None else mask_reader(fields[masks], masks)
            pictures = (fields[column] or {} for column in filter(None, (config.image_column, masks)))
            files = tuple(str(p["path"]) for p in pictures if p.get("bytes") is None and p.get("path"))
            yield Sample(f"{self._number}/{row}", captions, "", self.stamp, name, read, read_mask, files)

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._dataset.shard(num_shards=self._dataset.num_shards, index=self._number)
        except FAULTS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--dataset_name {self._config.dataset_name}: shard {self._number} cannot be read ({reason}): check "
                "the network and the data set, then run again"
            ) from error


def _files_of(builder: Any) -> Iterator[str]:
    """The files of the train split with what tells their versions apart: commit, ETag, or time and size."""
    files = (builder.config.data_files or {}).get("train")
    for file, version in zip(files or [], getattr(files, "origin_metadata", None) or [], strict=False):
        yield f"{file} {version} {os.path.getsize(file) if os.path.isfile(file) else ''}"
