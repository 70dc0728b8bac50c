"""Opens data sets through `datasets`, which is imported here and nowhere else."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from lpl.config import require
from lpl.errors import UserError


def load_train_split(
    name: str, config_name: str | None, cache_dir: str | None, image_column: str, caption_column: str
) -> Dataset:
    """The train split, cut to its image and caption columns, with images left encoded (`bytes` or `path`).

    No code of the data set is run: `datasets` is never told to trust it.

    Raises:
        UserError: not found, no train split, or a column missing or of another kind.
    """
    source = f"--dataset_name {name}"
    local = Path(name).expanduser()
    try:
        dataset = _open(local, config_name, source) if _was_saved(local) else _load(local, name, config_name, cache_dir)
    except (DatasetsError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source}: cannot be opened ({reason}): check the name, --dataset_config_name and the network"
        ) from error
    _check_columns(dataset.features, source, image_column, caption_column)
    return dataset.select_columns([image_column, caption_column]).cast_column(image_column, Image(decode=False))


def _was_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    files = [folder / name for name in ("dataset_dict.json", "dataset_info.json", "state.json")]
    return files[0].is_file() or (files[1].is_file() and files[2].is_file())


def _open(folder: Path, config_name: str | None, source: str) -> Dataset:
    require(
        config_name is None,
        f"--dataset_config_name {config_name}: {folder} was saved by save_to_disk and has no configurations: drop it",
    )
    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        require("train" in saved, f"{source}: no split train; it has: {', '.join(saved)}; save one under that name")
        return saved["train"]
    return saved


def _load(local: Path, name: str, config_name: str | None, cache_dir: str | None) -> Dataset:
    return load_dataset(str(local) if local.is_dir() else name, config_name, cache_dir=cache_dir, split="train")


def _check_columns(features: Features, source: str, image_column: str, caption_column: str) -> None:
    there = ", ".join(features)
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        require(column in features, f"{flag} {column}: {source} has no such column; it has: {there}")
    kind = features[image_column]
    stored = isinstance(kind, Value) and kind.dtype in ("string", "large_string", "binary", "large_binary")
    encoded = isinstance(kind, dict) and {"bytes", "path"} <= set(kind)
    require(
        isinstance(kind, Image) or stored or encoded,
        f"--image_column {image_column}: {source} holds {kind} there, not images; it has: {there}",
    )
