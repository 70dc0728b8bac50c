"""Where images and captions come from: a folder, a data set, a stream of one, or WebDataset shards."""

from __future__ import annotations

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.sources.base import Piece, Sample, Source
from lpl.data.sources.folder import TRAIN_FLAG, open_folder
from lpl.data.sources.webdataset import open_shards

__all__ = ["Piece", "Sample", "Source", "open_regularisation", "open_source", "open_validation"]


def open_source(config: DataConfig, cache_dir: str | None) -> Source:
    """The samples that --train_data_dir, --dataset_name or --webdataset names, cut to --max_train_samples.

    `cache_dir` is where `datasets` keeps downloads; None: its own default.

    Raises:
        UserError: nothing named, not found, or without the images and captions that are needed.
    """
    if config.train_data_dir is not None:
        return open_folder(config.train_data_dir, config, TRAIN_FLAG)
    if config.webdataset is not None:
        return open_shards(config.webdataset, config)
    if config.dataset_name is None:
        raise UserError(
            "no data: give --train_data_dir (an image folder), --dataset_name (a data set) or --webdataset (shards)"
        )
    # datasets takes seconds to load: folders and shards do without.
    from lpl.data.sources import hub

    return (hub.open_stream if config.streaming else hub.open_dataset)(config.dataset_name, config, cache_dir)


def open_regularisation(config: DataConfig) -> Source | None:
    """The folder that --reg_data_dir names, whole whatever --max_train_samples says; None where it is not given.

    Its images have captions of their own, whatever --instance_prompt says.

    Raises:
        UserError: not found, or without the images and captions that are needed.
    """
    return None if config.reg_data_dir is None else open_folder(config.reg_data_dir, config, "--reg_data_dir")


def open_validation(config: DataConfig) -> Source | None:
    """The folder that --validation_data_dir names, whole; None where it is not given.

    Raises:
        UserError: as open_regularisation.
    """
    folder = config.validation_data_dir
    return None if folder is None else open_folder(folder, config, "--validation_data_dir")
