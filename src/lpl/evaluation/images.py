"""Images on disk as square uint8 tensors of one size, and what is kept of a set of them, image by image."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lpl.base.errors import UserError, require
from lpl.base.terminal import progress
from lpl.base.text import read_rows, text_of
from lpl.data.bad_files import BadImageError
from lpl.data.crops import plan_crop, render
from lpl.data.decode import decode_image
from lpl.data.sheets import png_of
from lpl.data.sources.base import IMAGE_SUFFIXES
from lpl.data.sources.listing import list_images, tell_left_out
from lpl.diffusion.draws import keyed_generator
from lpl.evaluation.features import Extractor
from lpl.evaluation.metrics import Moments, power_spectrum

CAPTIONS = "metadata.jsonl"
INTERPOLATION = "lanczos"

logger = logging.getLogger("lpl")


def list_pictures(folder: Path, flag: str) -> list[Path]:
    """The images in a folder and its subfolders, in the order of their names, as training lists them.

    Names that begin with a dot are left out; links to folders are followed, but no folder is listed twice.

    Raises:
        UserError: no such folder, no images in it, or a name that is not UTF-8.
    """
    require(folder.is_dir(), f"{flag} {folder}: no such folder")
    listing = list_images(str(folder))._replace(orphans=[], doubled=[], tables=[])
    told = tell_left_out(listing)
    if told:
        logger.warning("%s %s: %s", flag, folder, told)
    found = sorted(folder / name for name in listing.images)
    require(bool(found), f"{flag} {folder}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    return found


def read_picture(file: Path, size: int, flag: str) -> Tensor:
    """An image's centre, resized to cover the size (Lanczos), as (3, size, size) uint8.

    Raises:
        UserError: a file that cannot be read as an image.
    """
    image = _decoded(file, flag)
    return render(image, plan_crop(image.width, image.height, (size, size), True), INTERPOLATION)


def pictures_digest(files: list[Path], flag: str) -> str:
    """A hash of the files' bytes and their order.

    Raises:
        UserError: one cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            found.update(hashlib.blake2b(file.read_bytes(), digest_size=16).digest())
        except OSError as error:
            raise UserError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    return found.hexdigest()


def shortest_side(file: Path, flag: str) -> int:
    """Pixels of an image's shorter side; raises as read_picture."""
    return min(_decoded(file, flag).size)


def count_smaller(files: list[Path], size: int) -> int:
    """How many images have a side below `size` pixels, by their headers; what Pillow does not open is not counted."""
    found = 0
    for file in files:
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:
            found += min(image.size) < size
    return found


def _decoded(file: Path, flag: str) -> Image.Image:
    try:
        return decode_image(file.read_bytes())
    except OSError as error:
        raise UserError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    except BadImageError as error:
        raise UserError(f"{flag}: {file}: {error}; repair or remove it") from error


def read_captions(folder: Path, files: list[Path], flag: str) -> list[str] | None:
    """Captions of the images by the folder's metadata.jsonl; None unless it has one for every image.

    Raises:
        UserError: a metadata.jsonl that cannot be read as such.
    """
    file = folder / CAPTIONS
    if not file.is_file():
        return None
    by_name = {str(row.get("file_name")): text_of(row, where) for where, row in read_rows(file, f"{flag} {file}")}
    found = [by_name.get(path.relative_to(folder).as_posix()) for path in files]
    return [text for text in found if text is not None] if None not in found else None


def as_png(pixels: Tensor) -> bytes:
    """A PNG file of (3, H, W) uint8."""
    return png_of(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), compress_level=1)


BATCH = 16
"""Images whose features are computed together: larger batches leave a CPU's caches."""


def read_pictures(files: list[Path], size: int, flag: str) -> Iterator[Tensor]:
    """Batches (B, 3, size, size), uint8, of read_picture."""
    for start in range(0, len(files), BATCH):
        yield torch.stack([read_picture(file, size, flag) for file in files[start : start + BATCH]])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Features and power spectra of images."""

    features: Tensor
    """(N, d), float32."""
    power: Tensor
    """(N, F), float64."""

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        return Moments(self.features)

    def part(self, chosen: slice) -> ImageSet:
        """Some of the images."""
        return ImageSet(self.features[chosen], self.power[chosen])


def measure(images: Iterable[Tensor], extractor: Extractor, total: int | None = None, show: bool = False) -> ImageSet:
    """Features and power spectra of images in batches (B, 3, H, H), uint8; `total` is their number, for the bar."""
    features, power = [], []
    with progress(desc=f"features of {extractor.name}", unit="img", total=total, show=show) as bar:
        for batch in images:
            for part in batch.split(BATCH):
                features.append(extractor(part))
                power.append(power_spectrum(part).cpu())
                bar.update(len(part))
    return ImageSet(torch.cat(features), torch.cat(power))


def resample_counts(size: int, resamples: int, seed: int) -> Tensor:
    """How often each of `size` samples is drawn, with replacement, in each resample: (R, size), float64."""
    drawn = torch.randint(size, (resamples, size), generator=keyed_generator(seed, "bootstrap"))
    counts = torch.zeros(resamples, size, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def interval(value: float, resampled: Tensor, low: float = float("-inf"), high: float = float("inf")) -> list[float]:
    """95 % bootstrap interval: quantiles of the resampled values, shifted so that their mean is the value.

    A resample repeats samples, which makes distances larger and shares smaller than they are: without the shift, the
    interval may not hold the value itself.

    Args:
        value: of all samples.
        resampled: (R,), of the resamples.
        low, high: the bounds of the metric.
    """
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [min(max(float(end) - float(resampled.mean()) + value, low), high) for end in ends]
