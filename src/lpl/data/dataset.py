"""Training samples out of the caches: which crop, flip, caption and posterior sample each draw sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl.data.cache import TensorCache
from lpl.data.sources import Record
from lpl.diffusion.draws import draw_normal, keyed_uniform


def caption_key(caption: str) -> str:
    """Key of a caption in the text cache."""
    return hashlib.blake2b(caption.encode(), digest_size=20).hexdigest()


@dataclass(frozen=True)
class View:
    """One cached rendering of an image: its key in the latent cache and the size conditioning that belongs to it."""

    latent_key: str
    size_conditioning: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """What a training step needs of its samples, on the CPU.

    Attributes:
        sample_ids: id of each sample.
        counts: how often each has been drawn before; with the id, the key of every further draw.
        raw_latents: (B, C, h, w), float32, raw latent space: what the VAE's decoder takes.
        text: by field, (B, ...).
        sizes: (B, 6), float32: original height, width, crop top, left, target height, width, in pixels.
    """

    sample_ids: list[str]
    counts: list[int]
    raw_latents: Tensor
    text: dict[str, Tensor]
    sizes: Tensor


class TrainingData:
    """Records with their cached views and captions.

    Args:
        records: the samples.
        views: per sample and crop variant, its view or (with flips) the plain and the mirrored one.
        latents: cache with the fields mean and std, (C, h, w), raw latent space, of every view.
        text: cache with the fields of every caption and, if captions are dropped, of the empty one.
        seed: seed of the run.
        proportion_empty_prompts: share of draws whose caption is replaced by the empty one.
    """

    def __init__(
        self,
        records: Sequence[Record],
        views: Sequence[Sequence[Sequence[View]]],
        latents: TensorCache,
        text: TensorCache,
        seed: int,
        proportion_empty_prompts: float = 0.0,
    ) -> None:
        self.records = records
        self.views = views
        self.latents = latents
        self.text = text
        self.seed = seed
        self.proportion_empty_prompts = proportion_empty_prompts

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.records)

    def view(self, index: int, count: int) -> View:
        """The view that a draw takes: the variant is drawn for (seed, "variant", id, count), the flip likewise."""
        variants, sample = self.views[index], self.records[index].id
        flips = variants[int(keyed_uniform(self.seed, "variant", sample, count) * len(variants))]
        return flips[int(keyed_uniform(self.seed, "flip", sample, count) * len(flips))]

    def caption(self, index: int, count: int) -> str:
        """The caption that a draw takes: its own, or the empty one if (seed, "dropout", id, count) says so."""
        record = self.records[index]
        dropped = keyed_uniform(self.seed, "dropout", record.id, count) < self.proportion_empty_prompts
        return "" if dropped else record.caption

    def batch(self, draws: Sequence[tuple[int, int]]) -> Batch:
        """The samples of a batch; each depends on its own index and count alone.

        The raw latents are a fresh posterior sample at each draw: mean + std * normal(seed, "posterior", id, count).

        Args:
            draws: (sample index, how often that sample has been drawn before), B of them.
        """
        latents, texts, sizes = [], [], []
        for index, count in draws:
            view, sample = self.view(index, count), self.records[index].id
            posterior = self.latents.get(view.latent_key)
            mean, std = posterior["mean"], posterior["std"]
            latents.append(mean + std * draw_normal(tuple(mean.shape), self.seed, "posterior", sample, count))
            texts.append(self.text.get(caption_key(self.caption(index, count))))
            sizes.append(view.size_conditioning)
        return Batch(
            sample_ids=[self.records[index].id for index, _ in draws],
            counts=[count for _, count in draws],
            raw_latents=torch.stack(latents),
            text={name: torch.stack([text[name] for text in texts]) for name in texts[0]},
            sizes=torch.tensor(sizes, dtype=torch.float32),
        )
