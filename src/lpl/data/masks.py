"""Masks of the loss: how much each location of an image counts, at the resolution of its latents.

A mask is cropped exactly as its image (resized, cut and mirrored alike); a latent's value is then the mean over its
stride x stride pixels. The mask is cached as it was drawn; --unmasked_weight is applied at each draw.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lpl.config import DataConfig
from lpl.data.bad_files import BadImageError
from lpl.data.crops import Crop, render
from lpl.data.decode import decode_image
from lpl.data.shard import KEY_BYTES
from lpl.data.sources.base import Sample

BLACK = (0, 0, 0)


class Mask(NamedTuple):
    """The mask of an image."""

    digest: bytes
    """sha256 of the file that holds it: its own, or the image's."""
    image: Image.Image
    """Mode L, of the upright image's size; 255 counts in full."""


def mask_source(config: DataConfig) -> str:
    """Where masks are from, as part of a catalogue's name; "" where they are not in use."""
    if config.masked_loss != "files":
        return "" if config.masked_loss == "none" else f" masks {config.masked_loss}"
    folder = "" if config.mask_dir is None else os.path.abspath(config.mask_dir)
    return f" masks files {folder} {config.mask_column or ''}"


def mask_of(config: DataConfig, sample: Sample, image: Mask, alpha: Image.Image | None) -> Mask | None:
    """The mask of a sample by its file, or by its image's opacity (mode L); None: all of it counts.

    Raises:
        BadImageError: a mask that cannot be read, is of another aspect, or leaves nothing.
    """
    if config.masked_loss == "alpha":
        if alpha is None or alpha.getextrema() == (255, 255):
            return None
        if alpha.getextrema() == (0, 0):
            raise BadImageError("transparent everywhere, so that nothing of it would be trained")
        return Mask(image.digest, alpha)
    try:
        data = None if sample.read_mask is None else sample.read_mask()
    except BadImageError as error:
        raise type(error)(f"its mask: {error.reason}") from None
    if data is None:
        return None
    return Mask(hashlib.sha256(data).digest(), decode_mask(data, image.image.size))


def decode_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """A mask file as an image of mode L and of this (width, height); colours count by their luma, transparent is black.

    Raises:
        BadImageError: not an image, of another aspect than `size`, or black everywhere.
    """
    try:
        mask = decode_image(data, BLACK).convert("L")
    except BadImageError as error:
        raise type(error)(f"its mask: {error.reason}") from None
    (width, height), (own_width, own_height) = size, mask.size
    # One pixel of rounding either way.
    if abs(own_width * height - width * own_height) > max(width, height, own_width, own_height):
        raise BadImageError(
            f"its mask is {own_width} x {own_height} pixels, of another aspect than the image's {width} x {height}"
        )
    if mask.getextrema() == (0, 0):
        raise BadImageError("its mask is black everywhere, so that nothing of it would be trained")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def mask_keys(config: DataConfig, digest: bytes, crops: dict[bytes, Crop]) -> dict[bytes, Crop]:
    """Crops by the keys of their masks in the cache; none where the image has no mask (an empty digest)."""
    return {mask_key(config, digest, crop): crop for crop in crops.values()} if digest else {}


def mask_key(config: DataConfig, digest: bytes, crop: Crop) -> bytes:
    """Key of a crop's mask: a hash of the file's bytes, of how it is read, and of the crop."""
    numbers = (*crop.original_size, *crop.resized_size, *crop.top_left, *crop.target_size, int(crop.flip))
    found = hashlib.blake2b(digest, digest_size=KEY_BYTES)
    found.update(struct.pack("<9q", *numbers) + config.masked_loss.encode())
    return found.digest()


def crop_mask(mask: Image.Image, crop: Crop, stride: int) -> Tensor:
    """The mask of a crop's latents, from that of the whole image (mode L); `stride`: pixels per latent.

    Returns:
        (1, H / stride, W / stride), uint8, 0..255: the mean over each latent's pixels.
    """
    pixels = render(mask, crop, "bilinear")  # of the filters that antialias, the widest without overshoot
    return avg_pool2d(pixels.float(), stride).round().to(torch.uint8)


def location_weights(stored: Tensor, unmasked_weight: float) -> tuple[Tensor, Tensor]:
    """How much each location of each sample counts, and each sample as a whole.

        w = m + (1 - m) * unmasked_weight,    sample weight = max over locations of w

    The loss is a mean weighted by w, in which only ratios of w matter: without the sample weight, a crop that misses
    the marked area would count its background in full, however small unmasked_weight is.

    Args:
        stored: (B, 1, h, w), uint8, 0..255.
        unmasked_weight: in 0..1.

    Returns:
        (B, 1, h, w) and (B,), float32, in 0..1.
    """
    marked = stored.float() / 255
    weights = marked + (1 - marked) * unmasked_weight
    return weights, weights.amax((1, 2, 3))
