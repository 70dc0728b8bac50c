"""Data sets read as streams: nothing is stored, each row passes by once."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from datasets import Image, IterableDataset, load_dataset_builder

from lpl.config import DataConfig, require
from lpl.data.sources.base import Piece, Sample, captions_of, digest
from lpl.data.sources.first import cut
from lpl.data.sources.hub import (
    FAULTS,
    arguments_of,
    cannot_open,
    check_columns,
    identity_of,
    mask_column,
    mask_reader,
    reader,
    was_saved,
)
from lpl.data.sources.prompted import with_prompt
from lpl.data.sources.versions import Versions
from lpl.errors import UserError


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
