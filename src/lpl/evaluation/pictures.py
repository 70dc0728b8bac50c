"""Images on disk as square uint8 tensors of one size."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lpl.config import require
from lpl.data.bad_image import BadImageError
from lpl.data.crops import plan_crop, render
from lpl.data.decode import decode_image
from lpl.data.sources.base import IMAGE_SUFFIXES
from lpl.errors import UserError

CAPTIONS = "metadata.jsonl"
INTERPOLATION = "lanczos"


def list_pictures(folder: Path, flag: str) -> list[Path]:
    """The images in a folder and its subfolders, in the order of their names; names that begin with a dot are left out.

    Raises:
        UserError: no such folder, or no images in it.
    """
    require(folder.is_dir(), f"{flag} {folder}: no such folder")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    require(bool(found), f"{flag} {folder}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    return found


def read_picture(file: Path, size: int, flag: str) -> tuple[Tensor, bytes, bool]:
    """An image's centre, resized to cover the size (Lanczos), as (3, size, size) uint8.

    Returns:
        The pixels, a digest of the file, and whether it had to be enlarged.

    Raises:
        UserError: a file that cannot be read as an image.
    """
    try:
        data = file.read_bytes()
        image = decode_image(data)
    except OSError as error:
        raise UserError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    except BadImageError as error:
        raise UserError(f"{flag}: {file}: {error}; repair or remove it") from error
    crop = plan_crop(image.width, image.height, (size, size), True)
    return render(image, crop, INTERPOLATION), hashlib.blake2b(data, digest_size=16).digest(), crop.upscaled


def shortest_side(file: Path, flag: str) -> int:
    """Pixels of an image's shorter side.

    Raises:
        UserError: a file that cannot be read as an image.
    """
    try:
        return min(decode_image(file.read_bytes()).size)
    except (OSError, BadImageError) as error:
        raise UserError(f"{flag}: {file}: {error}; repair or remove it") from error


def read_captions(folder: Path, files: list[Path]) -> list[str] | None:
    """Captions of the images by the folder's metadata.jsonl; None where it has none for every image."""
    file = folder / CAPTIONS
    if not file.is_file():
        return None
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    by_name = {str(row.get("file_name")): row.get("text") for row in rows}
    found = [by_name.get(path.relative_to(folder).as_posix()) for path in files]
    return [str(text) for text in found] if all(isinstance(text, str) for text in found) else None


def as_png(pixels: Tensor) -> bytes:
    """A PNG file of (3, H, W) uint8."""
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(out, "PNG", compress_level=1)
    return out.getvalue()


def batches(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stacks of up to `size` images."""
    held: list[Tensor] = []
    for image in images:
        held.append(image)
        if len(held) == size:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)
