"""Where images and captions come from: a folder of files, or a data set that `datasets` reads.

Differs from datasets' own image folder: an image without a caption is refused, as is a caption without an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lpl.config import DataConfig, require
from lpl.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Record:
    """One sample: an id that stays the same from run to run, and its caption."""

    id: str
    caption: str


class Source(Protocol):
    """Samples in a fixed order; a sample's image is read when it is asked for."""

    @property
    def records(self) -> Sequence[Record]:
        """Id and caption of each sample."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image file of a sample."""
        ...

    def describe(self, index: int) -> str:
        """What to call a sample's image in a message."""
        ...


def open_source(config: DataConfig, cache_dir: str | None) -> Source:
    """The samples that --train_data_dir or --dataset_name names, cut to --max_train_samples.

    Args:
        config: the options of the data.
        cache_dir: where `datasets` keeps downloads; None: its own default.

    Raises:
        UserError: nothing named, not found, or without the images and captions that are needed.
    """
    if config.train_data_dir is not None:
        return ImageFolder(Path(config.train_data_dir).expanduser(), config.caption_column, config.max_train_samples)
    if config.dataset_name is None:
        raise UserError("no data: give --train_data_dir (an image folder) or --dataset_name (a data set)")
    return HubDataset(config, cache_dir)


def first_caption(value: Any, where: str) -> str:
    """The caption in a field that holds a string or a list of strings, of which the first one is used.

    Raises:
        UserError: anything else.
    """
    first = value[0] if isinstance(value, list | tuple) and value else value
    require(
        isinstance(first, str),
        f"{where}: a caption must be a string or a list of strings, not {str(value)[:60]!r}: correct it, or name "
        "another field with --caption_column",
    )
    return str(first)


class ImageFolder:
    """A folder of images, nested as deep as one likes, in the order of their paths.

    Captions come from `metadata.jsonl` files (one in any folder; `file_name` is relative to it; a list of captions
    gives its first one) or else from a .txt file beside the image. A sample's id is its path relative to the folder,
    with / as separator. Hidden files and folders are left out.

    Args:
        folder: the folder.
        caption_column: key of the captions in metadata.jsonl.
        max_samples: use only the first so many images.

    Raises:
        UserError: no folder, no images, an image without caption, or a faulty metadata.jsonl.
    """

    def __init__(self, folder: Path, caption_column: str = "text", max_samples: int | None = None) -> None:
        require(
            folder.is_dir(),
            f"--train_data_dir {folder}: {'not a folder' if folder.exists() else 'no such folder'}: give an image "
            "folder, or name a data set with --dataset_name",
        )
        self.folder = folder
        files = _visible_files(folder)
        captions: dict[str, str] = {}
        for name in files:
            if os.path.basename(name) == "metadata.jsonl":
                captions |= _read_metadata(folder, name, caption_column)
        images = sorted({name for name in files if name.lower().endswith(IMAGE_SUFFIXES)} | captions.keys())
        require(bool(images), f"--train_data_dir {folder}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
        images = images[:max_samples]
        for name in images:
            text = folder / (os.path.splitext(name)[0] + ".txt")
            if name not in captions and text.is_file():
                captions[name] = _read_text(text).strip()
        missing = [name for name in images if name not in captions]
        require(
            not missing,
            f"--train_data_dir {folder}: {len(missing)} of {len(images)} images have no caption, first "
            f"{missing[0] if missing else ''}: list them in metadata.jsonl, or put a .txt of the same name beside each",
        )
        self.records: Sequence[Record] = [Record(name, captions[name]) for name in images]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def read(self, index: int) -> bytes:
        """The file of an image.

        Raises:
            UserError: it cannot be read.
        """
        return _read_image(self.folder / self.records[index].id)

    def describe(self, index: int) -> str:
        """The path of an image."""
        return str(self.folder / self.records[index].id)


class HubDataset:
    """The train split of a data set on the Hub, or of a local folder that `datasets` reads or has saved.

    A sample's id is the number of its row. A caption column may hold strings or lists of strings; of a list the first
    one is used.

    Raises:
        UserError: no such data set, split or column, or a caption that is none.
    """

    def __init__(self, config: DataConfig, cache_dir: str | None) -> None:
        from lpl.data.hub import load_train_split

        assert config.dataset_name is not None
        self.name = config.dataset_name
        self._column = config.image_column
        dataset = load_train_split(
            config.dataset_name, config.dataset_config_name, cache_dir, config.image_column, config.caption_column
        )
        require(len(dataset) > 0, f"--dataset_name {self.name}: its train split is empty")
        if config.max_train_samples is not None:
            dataset = dataset.select(range(min(config.max_train_samples, len(dataset))))
        self._dataset = dataset
        captions = list(dataset[config.caption_column])
        self.records: Sequence[Record] = [
            Record(str(row), first_caption(caption, f"--caption_column {config.caption_column}, {self.describe(row)}"))
            for row, caption in enumerate(captions)
        ]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.records)

    def read(self, index: int) -> bytes:
        """The image file of a row.

        Raises:
            UserError: the row holds no image, or names a file that cannot be read.
        """
        image = self._dataset[index][self._column] or {}
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        path = str(image.get("path") or "")
        require(path != "", f"{self.describe(index)} holds no image in --image_column {self._column}: remove the row")
        return _read_image(Path(path))

    def describe(self, index: int) -> str:
        """The number of a row and its data set."""
        return f"row {index} of {self.name}"


def _visible_files(folder: Path) -> list[str]:
    """Sorted relative paths, with /, of all files below a folder; links to folders are followed, each folder once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            relative = Path(parent).relative_to(folder)
            found += [(relative / name).as_posix() for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def _read_metadata(folder: Path, name: str, caption_column: str) -> dict[str, str]:
    """Captions by image, relative to the folder, of one metadata.jsonl."""
    captions: dict[str, str] = {}
    parent = os.path.dirname(name)
    for number, line in enumerate(_read_text(folder / name).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{folder / name}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}): write one JSON object a line") from None
        require(isinstance(entry, dict), f"{where}: not a JSON object: write one JSON object a line")
        keys = ", ".join(map(str, entry)) or "none"
        file_name = entry.get("file_name")
        require(isinstance(file_name, str), f"{where}: no key file_name; its keys: {keys}")
        image = os.path.normpath(os.path.join(parent, str(file_name))).replace(os.sep, "/")
        require((folder / image).is_file(), f"{where}: {file_name} does not exist: correct the line or remove it")
        require(
            caption_column in entry,
            f"{where}: no key {caption_column}; its keys: {keys}; name the captions' key with --caption_column",
        )
        require(image not in captions, f"{where}: {file_name} is listed a second time: keep one line for each image")
        captions[image] = first_caption(entry[caption_column], where)
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): correct its permissions or remove it") from None


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): restore the file or remove its entry") from None
