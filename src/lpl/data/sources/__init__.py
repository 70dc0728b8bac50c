"""Where images and captions come from: a folder, a data set, a stream of one, or WebDataset shards."""

from __future__ import annotations

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.sources.base import Piece, Sample, Source
from lpl.data.sources.folder import FolderSource
from lpl.data.sources.webdataset import WebDatasetSource

__all__ = ["Piece", "Sample", "Source", "open_regularisation", "open_source", "open_validation"]


def open_source(config: DataConfig, cache_dir: str | None) -> Source:
    """The samples that --train_data_dir, --dataset_name or --webdataset names, cut to --max_train_samples.

    Args:
        config: the options of the data.
        cache_dir: where `datasets` keeps downloads; None: its own default.

    Raises:
        UserError: nothing named, not found, or without the images and captions that are needed.
    """
    if config.train_data_dir is not None:
        masks = config.masked_loss == "files"
        return FolderSource(
            config.train_data_dir,
            config.caption_column,
            config.max_train_samples,
            masks=masks,
            mask_dir=config.mask_dir,
            instance_prompt=config.instance_prompt,
        )
    if config.webdataset is not None:
        return WebDatasetSource(
            config.webdataset,
            config.caption_column,
            config.max_train_samples,
            config.masked_loss == "files",
            config.instance_prompt,
        )
    if config.dataset_name is None:
        raise UserError(
            "no data: give --train_data_dir (an image folder), --dataset_name (a data set) or --webdataset (shards)"
        )
    # datasets takes seconds to load: folders and shards do without.
    if config.streaming:
        from lpl.data.sources.hub import StreamSource

        return StreamSource(config, cache_dir)
    from lpl.data.sources.hub import HubSource

    return HubSource(config, cache_dir)


def open_regularisation(config: DataConfig) -> Source | None:
    """The folder that --reg_data_dir names, whole whatever --max_train_samples says; None where it is not given.

    Its images have captions of their own, whatever --instance_prompt says.

    Raises:
        UserError: not found, or without the images and captions that are needed.
    """
    return _open_folder(config, "reg_data_dir")


def open_validation(config: DataConfig) -> Source | None:
    """The folder that --validation_data_dir names; None where it is not given.

    Raises:
        UserError: as open_regularisation.
    """
    return _open_folder(config, "validation_data_dir")


def _open_folder(config: DataConfig, option: str) -> Source | None:
    folder = getattr(config, option)
    if folder is None:
        return None
    masks, prompt = config.masked_loss == "files", None if option == "reg_data_dir" else config.instance_prompt
    return FolderSource(folder, config.caption_column, flag=f"--{option}", masks=masks, instance_prompt=prompt)
