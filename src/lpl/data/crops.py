"""The crop that both pixels and size conditioning follow."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpl.config import DataConfig
from lpl.data.buckets import image_sizes
from lpl.data.shard import KEY_BYTES
from lpl.diffusion.draws import keyed_uniform


@dataclass(frozen=True)
class Crop:
    """Which part of an image is used, after it has been turned upright, resized and (if flip) mirrored.

    Sizes are (height, width) and `top_left` is (y, x), in pixels; `top_left` counts in the resized, mirrored image.
    """

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    top_left: tuple[int, int]
    target_size: tuple[int, int]
    flip: bool

    @property
    def size_conditioning(self) -> tuple[int, ...]:
        """Six ints in SDXL's order: original height, width, crop top, left, target height, width."""
        return self.original_size + self.top_left + self.target_size

    @property
    def scale(self) -> float:
        """The factor by which resizing enlarges the image, of the side that grows most."""
        return max(new / old for new, old in zip(self.resized_size, self.original_size, strict=True))

    @property
    def upscaled(self) -> bool:
        """Whether resizing enlarges the image."""
        return self.resized_size[0] > self.original_size[0] or self.resized_size[1] > self.original_size[1]

    @property
    def cropped_away(self) -> float:
        """Share of the resized image's area that the crop leaves out, 0 up to but not 1."""
        (height, width), (resized_height, resized_width) = self.target_size, self.resized_size
        return 1 - height * width / (resized_height * resized_width)


def plan_crop(
    width: int, height: int, target: tuple[int, int], center: bool, *key: int | str, flip: bool = False
) -> Crop:
    """Resizes to the smallest size that covers the target, keeping the aspect, and crops what lies outside it.

    Args:
        width: width of the upright image, pixels.
        height: its height.
        target: (height, width) of the crop.
        center: crop the centre; else at offsets drawn for (*key, "x") and (*key, "y").
        *key: what the random offsets are drawn for.
        flip: mirror; the crop shows the mirror image of the crop without flip, at x' = resized width - width - x.
    """
    target_height, target_width = target
    if target_height * width >= target_width * height:
        resized_height, resized_width = target_height, max(target_width, round(width * target_height / height))
    else:
        resized_height, resized_width = max(target_height, round(height * target_width / width)), target_width
    free_y, free_x = resized_height - target_height, resized_width - target_width
    if center:
        y, x = free_y // 2, free_x // 2
    else:
        y, x = int(keyed_uniform(*key, "y") * (free_y + 1)), int(keyed_uniform(*key, "x") * (free_x + 1))
    return Crop(
        original_size=(height, width),
        resized_size=(resized_height, resized_width),
        top_left=(y, free_x - x if flip else x),
        target_size=(target_height, target_width),
        flip=flip,
    )


def render(image: Image.Image, crop: Crop, interpolation: str) -> Tensor:
    """The pixels of a crop.

    Resizing is antialiased and exact (no drafts, no reducing first), and only the crop is computed: an image of
    any aspect costs no more memory than its crop.

    Args:
        image: upright image of the crop's original size, of mode RGB or L.
        crop: what to cut out of it.
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos; nearest alone does not antialias.

    Returns:
        (3 or 1, H, W), uint8, of the crop's target size.

    Raises:
        ValueError: the crop was planned for an image of another size.
    """
    if (image.height, image.width) != crop.original_size:
        raise ValueError(f"crop planned for {crop.original_size}, image is {(image.height, image.width)}")
    (resized_height, resized_width), (y, x), (height, width) = crop.resized_size, crop.top_left, crop.target_size
    if crop.flip:
        x = resized_width - width - x
    if crop.resized_size == crop.original_size:
        image = image.crop((x, y, x + width, y + height))
    else:
        down, across = image.height / resized_height, image.width / resized_width
        box = (x * across, y * down, (x + width) * across, (y + height) * down)
        image = image.resize((width, height), Image.Resampling[interpolation.upper()], box)
    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image).reshape(height, width, -1)).permute(2, 0, 1).contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape, 0..255, to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1.0


CROP_SEED = 0
"""Random crops lie where (0, "crop", sample, variant) says: runs of other seeds share them, and the cache."""


class Views:
    """The crops of every image under the options of the data."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.buckets = image_sizes(config)
        self._settings = json.dumps([config.image_interpolation_mode, config.background_color]).encode()

    @property
    def settings(self) -> str:
        """All that decides which crops there are."""
        c = self.config
        return json.dumps([self.buckets.sizes, c.center_crop, c.crop_variants, c.random_flip, self._settings.decode()])

    @property
    def per_image(self) -> int:
        """Crops of each image, mirrored ones counted."""
        return self.config.crop_variants * (2 if self.config.random_flip else 1)

    def key(self, digest: bytes, crop: Crop) -> bytes:
        """Key in the latent cache: a hash of the image's bytes and of everything that decides the crop's pixels."""
        numbers = (*crop.resized_size, *crop.top_left, *crop.target_size, int(crop.flip))
        found = hashlib.blake2b(digest, digest_size=KEY_BYTES)
        found.update(struct.pack("<7q", *numbers) + self._settings)
        return found.digest()

    def crop(self, sample: str, width: int, height: int, variant: int, flip: bool) -> Crop:
        """One crop of an upright image of this size, in pixels."""
        target = self.buckets.sizes[self.buckets.nearest(width, height)]
        key = (CROP_SEED, "crop", sample, variant)
        return plan_crop(width, height, target, self.config.center_crop, *key, flip=flip)

    def crops(self, sample: str, digest: bytes, width: int, height: int) -> dict[bytes, Crop]:
        """Every crop that a draw may take, by key."""
        flips = (False, True) if self.config.random_flip else (False,)
        found = (self.crop(sample, width, height, v, flip) for v in range(self.config.crop_variants) for flip in flips)
        return {self.key(digest, crop): crop for crop in found}

    def draw(self, seed: int, sample: str, width: int, height: int, count: int) -> Crop:
        """The crop of a draw: variant and flip are drawn for (seed, "variant" or "flip", sample, count)."""
        variants = self.config.crop_variants
        variant = int(keyed_uniform(seed, "variant", sample, count) * variants) if variants > 1 else 0
        flip = self.config.random_flip and keyed_uniform(seed, "flip", sample, count) >= 0.5
        return self.crop(sample, width, height, variant, flip)
