"""Which crops of an image there are, and the key under which each is cached."""

from __future__ import annotations

import hashlib
import json
import struct

from lpl.config import DataConfig
from lpl.data.buckets import image_sizes
from lpl.data.crops import Crop, plan_crop
from lpl.data.shard import KEY_BYTES
from lpl.diffusion.draws import keyed_uniform

CROP_SEED = 0
"""Random crops lie where (0, "crop", sample, variant) says: runs of other seeds share them, and the cache."""


class Views:
    """The crops of every image under the options of the data.

    Args:
        config: resolution, buckets, crops, flips, interpolation and background.
    """

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
