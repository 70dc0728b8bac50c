"""Which crops of which images a run draws from, and the key under which each is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from tqdm import tqdm

from lpl.config import DataConfig
from lpl.data.dataset import View
from lpl.data.sources import Source
from lpl.data.transforms import Crop, image_size, plan_crop

PROGRESS_FROM = 500


@dataclass(frozen=True)
class ImageJob:
    """An image of the source and, by key, the crops of it that no image before it has."""

    index: int
    crops: Mapping[str, Crop]


@dataclass(frozen=True)
class ViewPlan:
    """Views of every sample (per crop variant: plain and, with flips, mirrored) and what must be rendered for them."""

    views: list[list[list[View]]]
    jobs: list[ImageJob]
    upscaled: int
    """Images that are smaller than the resolution."""


def latent_key(image_digest: str, crop: Crop, interpolation: str) -> str:
    """Key of a crop in the latent cache: the image's bytes and everything that decides the crop's pixels."""
    parts = [image_digest, crop.resized_size, crop.top_left, crop.target_size, crop.flip, interpolation]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def plan_views(source: Source, config: DataConfig, seed: int, progress: bool) -> ViewPlan:
    """Plans the crops of all images, reading each file once and, where its format allows, no more than its header.

    Crop v of a sample lies where (seed, "crop", id, v) says.

    Args:
        source: images and captions.
        config: resolution, crops, flips and interpolation.
        seed: seed of the run.
        progress: show a bar if there are many images.

    Raises:
        UserError: an image that cannot be read.
    """
    views: list[list[list[View]]] = []
    jobs: list[ImageJob] = []
    planned: set[str] = set()
    upscaled = 0
    hidden = not progress or len(source) <= PROGRESS_FROM
    for index, record in enumerate(tqdm(source.records, "reading images", disable=hidden)):
        data = source.read(index)
        digest = hashlib.sha256(data).hexdigest()
        width, height = image_size(data, source.describe(index))
        crops: dict[str, Crop] = {}
        variants: list[list[View]] = []
        for variant in range(config.crop_variants):
            key = (seed, "crop", record.id, variant)
            flips = [
                plan_crop(width, height, config.crop_size, config.center_crop, *key, flip=flip)
                for flip in ((False, True) if config.random_flip else (False,))
            ]
            keys = [latent_key(digest, crop, config.image_interpolation_mode) for crop in flips]
            variants.append([View(k, crop.size_conditioning) for k, crop in zip(keys, flips, strict=True)])
            crops |= {k: crop for k, crop in zip(keys, flips, strict=True) if k not in planned}
        planned |= crops.keys()
        upscaled += flips[0].upscaled
        views.append(variants)
        jobs.append(ImageJob(index, crops))
    return ViewPlan(views, jobs, upscaled)
