"""Training samples out of the caches: which are held out; which crop, caption and posterior sample a draw sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.captions import CaptionRules
from lpl.data.catalogue import Row, Samples
from lpl.data.crops import Crop, Views
from lpl.data.filling import Caches, caption_key, cast_floats
from lpl.data.masks import location_weights, mask_key
from lpl.data.sampler import parse_repeats
from lpl.diffusion.draws import fill_normal, keyed_seed

VALIDATION = "validation/"
"""Put before the ids and folders of images of --validation_data_dir."""


class Split(NamedTuple):
    """Training samples and held-out ones; copies of a held-out image (of the same bytes) are neither."""

    trained: np.ndarray
    """(N,), bool: samples that training may draw."""
    held_out: np.ndarray
    """Numbers of the samples that validation uses, ascending."""

    @property
    def copies(self) -> int:
        """Samples that are left out of training because a held-out image has the same bytes."""
        return len(self.trained) - int(self.trained.sum()) - len(self.held_out)


def split_samples(samples: Samples, config: DataConfig, seed: int) -> Split:
    """Holds out the images of --validation_data_dir, or --validation_samples of the training images.

    Of the different images (by sha256 of their files) among the training images, those are held out whose keyed hash of
    (seed, "held_out", sha256) is lowest. So an image that is added can take the place of one held-out image at most,
    and neither order nor names enter. Every sample with the bytes of a held-out image, regularisation images included,
    is kept out of training.

    Raises:
        UserError: nothing is left to train on.
    """
    if config.validation_data_dir is None and not config.validation_samples:
        return Split(np.ones(len(samples), bool), np.empty(0, np.int64))
    prefixes, digests = samples.prefixes(), samples.digests()
    if config.validation_data_dir is not None:
        held = np.flatnonzero(prefixes == VALIDATION)
        images = {digests[index] for index in held.tolist()}
    else:
        first: dict[bytes, int] = {}
        for index in np.flatnonzero(prefixes == "").tolist():
            first.setdefault(digests[index], index)
        ranked = sorted(first, key=lambda digest: keyed_seed(seed, "held_out", digest.hex()))
        images = set(ranked[: config.validation_samples])
        held = np.array(sorted(first[digest] for digest in images), np.int64)
    trained = np.fromiter((digest not in images for digest in digests), bool, len(digests))
    if not (trained & (prefixes == "")).any():
        raise UserError(
            f"{holding_option(config)}: leaves none of the {int((prefixes == '').sum())} training images (copies "
            "counted) to train on: hold out fewer"
        )
    return Split(trained, held)


def split_repeats(samples: Samples, split: Split, config: DataConfig) -> np.ndarray:
    """How often an epoch draws each sample, (N,); 0 where training may not draw it.

    Raises:
        UserError: --repeats that does not go with the folders of what is left to training.
    """
    groups, codes = samples.groups()
    repeats = np.zeros(len(samples))
    repeats[split.trained] = parse_repeats(config.repeats, groups, codes[split.trained])
    return repeats


def holding_option(config: DataConfig) -> str:
    """What holds samples out, for messages."""
    if config.validation_data_dir is not None:
        return f"--validation_data_dir {config.validation_data_dir}"
    return f"--validation_samples {config.validation_samples}"


@dataclass(frozen=True)
class Batch:
    """What a training step needs of its samples, on the CPU.

    Attributes:
        sample_ids: id of each sample.
        counts: number of this draw of each sample, never the same twice; with the id, the key of all further draws.
        raw_latents: (B, C, h, w), float32, raw latent space: what the VAE's decoder takes.
        text: by field, (B, ...); where captions differ in length, the shorter ones are padded with zeros.
        extra: what else a denoiser may be given, by name: sizes, (B, 6), float32: original height, width, crop top,
            left, target height, width, in pixels.
        weights: (B,), float32: loss weight of each sample, LPL included, times its mask's maximum; None: all 1.
        strata: for stratified timesteps the part of their distribution that each sample draws from, and of how many
            parts (diffusion/draws.py); None: each draws from all of it.
        lpl_draws: a number in [0, 1) for each sample, which decides what --lpl_budget decodes of it.
        mask: (B, 1, h, w), float32, in [0, 1]: how much each location counts; None: all alike.
    """

    sample_ids: list[str]
    counts: list[int]
    raw_latents: Tensor
    text: dict[str, Tensor]
    extra: dict[str, Tensor]
    weights: Tensor | None = None
    strata: tuple[Sequence[int], int] | None = None
    lpl_draws: Sequence[float] | None = None
    mask: Tensor | None = None


def drawn_images(samples: Samples, repeats: np.ndarray) -> tuple[int, float]:
    """How many training images a run draws, and how often an epoch draws one on average.

    Regularisation images count where no others are drawn.
    """
    drawn = repeats > 0
    own = drawn & (samples.prefixes() == "")
    found = repeats[own if own.any() else drawn]
    return len(found), float(found.mean())


@dataclass(frozen=True)
class TrainingData:
    """Samples with their cached crops and captions.

    Attributes:
        samples: all usable samples, held-out ones included.
        views: which crops of each are cached.
        rules: which caption a draw takes.
        caches: latents with the fields mean and std, (C, h, w), raw latent space; text embeddings.
        seed: seed of the run.
        buckets: (N,), bucket of each sample.
        repeats: (N,), how often an epoch draws it; 0 for what is held out.
        split: what is held out.
    """

    samples: Samples
    views: Views
    rules: CaptionRules
    caches: Caches
    seed: int
    buckets: np.ndarray
    repeats: np.ndarray
    split: Split

    def __len__(self) -> int:
        """Number of samples that training may draw."""
        return int(self.split.trained.sum())

    def digest(self) -> str:
        """A hash of all ids, captions and image contents, in order, and of which of them training may draw."""
        found = self.samples.digest()
        if self.split.trained.all():
            return found
        return hashlib.blake2b(found.encode() + self.split.trained.tobytes(), digest_size=16).hexdigest()

    def batch(self, draws: Sequence[tuple[int, int]], fixed: bool = False) -> Batch:
        """The samples of a batch, all of one bucket; each depends on its own index and count alone.

        The raw latents are a fresh posterior sample at each draw: mean + std * normal(seed, "posterior", id, count).

        Args:
            draws: (sample index, number of the draw), B of them.
            fixed: for validation: always the first crop, not mirrored, and the first text, never dropped; noise of the
                posterior from a stream of its own, "validation_posterior".
        """
        stream = "validation_posterior" if fixed else "posterior"
        latents, texts, sizes, crops = [], [], [], []
        rows = [self.samples[index] for index, _ in draws]
        for row, (_, count) in zip(rows, draws, strict=True):
            if fixed:
                crop = self.views.crop(row.id, row.width, row.height, 0, False)
                text = next(iter(self.rules.variants(row.id, row.captions)), "")
            else:
                crop = self.views.draw(self.seed, row.id, row.width, row.height, count)
                text = self.rules.draw(row.id, row.captions, count)
            latents.append(self.views.key(row.digest, crop))
            texts.append(caption_key(text))
            sizes.append(crop.size_conditioning)
            crops.append(crop)
        posterior = self.caches.latents.gather(latents)
        raw, std = posterior["mean"].float(), posterior["std"].float()
        noise = torch.empty_like(raw)
        for own, row, (_, count) in zip(noise, rows, draws, strict=True):
            fill_normal(own, self.seed, stream, row.id, count)
        raw += noise.mul_(std)
        weights = torch.tensor([self.samples.weight(index) for index, _ in draws]) if self.samples.weighted else None
        mask = self._mask(rows, crops)
        if mask is not None:
            mask, own = location_weights(mask, self.views.config.unmasked_weight)
            weights = own if weights is None else weights * own
        return Batch(
            sample_ids=[row.id for row in rows],
            counts=[count for _, count in draws],
            raw_latents=raw,
            text=cast_floats(self.caches.text.gather_padded(texts), torch.float32),
            extra={"sizes": torch.tensor(sizes, dtype=torch.float32)},
            weights=weights,
            mask=mask,
        )

    def _mask(self, rows: Sequence[Row], crops: Sequence[Crop]) -> Tensor | None:
        """The cached masks, (B, 1, h, w), white where there is none; None if none of the samples has one."""
        if self.caches.masks is None:
            return None
        pairs = [(at, row, crop) for at, (row, crop) in enumerate(zip(rows, crops, strict=True)) if row.mask]
        if not pairs:
            return None
        found = self.caches.masks.gather([mask_key(self.views.config, row.mask, crop) for _, row, crop in pairs])
        mask = torch.full((len(rows), *found["mask"].shape[1:]), 255, dtype=torch.uint8)
        mask[[at for at, _, _ in pairs]] = found["mask"]
        return mask
