"""A few images, spread over the data, as a run would see them: crops, captions, masks; read and encoded, not cached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lpl.base.errors import UserError
from lpl.base.terminal import progress
from lpl.config import TrainConfig
from lpl.data.bad_files import BadImageError
from lpl.data.captions import CaptionRules
from lpl.data.crops import Crop, Views, render, to_float
from lpl.data.dataset import Batch
from lpl.data.decode import decode_with_alpha, parse_color
from lpl.data.filling import CAPTION_BATCH, batch_of
from lpl.data.masks import Mask, crop_mask, location_weights, mask_of
from lpl.data.reading import in_order, threads_of
from lpl.data.sources import Piece, Sample, Source
from lpl.data.sources.base import PIECE_SIZE
from lpl.data.store import padded
from lpl.diffusion.draws import fill_normal
from lpl.families.base import Family

MOST_PIECES = 16
"""Most pieces of a source that are opened, since a shard may have to be fetched."""


class Picture(NamedTuple):
    """One image as in a run's first draw of it."""

    id: str
    name: str
    caption: str
    crop: Crop
    pixels: Tensor
    """(3, H, W), uint8."""
    mask: Tensor | None
    """(1, h, w), uint8, at the resolution of latents; None: all of it counts."""


def read_pictures(config: TrainConfig, source: Source, count: int, stride: int) -> tuple[list[Picture], list[str]]:
    """Reads at most `count` images, spread over a source, with crop, mirroring and caption of a run's first draw.

    Returns:
        The pictures, with masks at one cell per `stride` pixels, and one line for each image that cannot be used.

    Raises:
        UserError: none can be used.
    """
    data, seed = config.data, config.run.seed
    views, rules, background = Views(data), CaptionRules(data, seed), parse_color(data.background_color)

    def make(sample: Sample) -> Picture | str:
        try:
            encoded = sample.read()
            image, alpha = decode_with_alpha(encoded, background)
            mask = mask_of(data, sample, Mask(hashlib.sha256(encoded).digest(), image), alpha)
        except BadImageError as error:
            return f"{sample.name}: {error.reason}"
        crop = views.draw(seed, sample.id, image.width, image.height, 0)
        pixels = render(image, crop, data.image_interpolation_mode)
        marked = None if mask is None else crop_mask(mask.image, crop, stride)
        caption = rules.draw(sample.id, list(sample.captions), 0)
        return Picture(sample.id, sample.name, caption, crop, pixels, marked)

    found = []
    with progress(desc="reading", unit="image", total=count) as bar:
        for piece, numbers in spread(source, count):
            with closing(piece.samples()) as samples:
                chosen = (s for n, s in enumerate(islice(samples, numbers[-1] + 1)) if n in numbers)
                for made in in_order(make, chosen, threads_of(data)):
                    found.append(made)
                    bar.update()
    pictures = [one for one in found if isinstance(one, Picture)]
    refused = [one for one in found if isinstance(one, str)]
    if not pictures:
        raise UserError(f"{source.name}: no image can be used" + (f", first: {refused[0]}" if refused else ""))
    return pictures, refused


def spread(source: Source, count: int) -> list[tuple[Piece, list[int]]]:
    """Which samples of which pieces to take: at most `count`, evenly from at most MOST_PIECES pieces.

    Only a piece's first PIECE_SIZE samples are considered; of pieces of unknown size only as many as are needed.
    """
    pieces = list(source.pieces)
    pieces = [pieces[i] for i in _even(len(pieces), min(MOST_PIECES, count))]
    each = -(-count // max(1, len(pieces)))
    reach = [min(each if piece.size is None else piece.size, PIECE_SIZE) for piece in pieces]
    wanted = _even(sum(reach), count)
    chosen, start = [], 0
    for piece, length in zip(pieces, reach, strict=True):
        own = [number - start for number in wanted if start <= number < start + length]
        start += length
        if own:
            chosen.append((piece, own))
    return chosen


def same_size(pictures: Sequence[Picture]) -> list[list[int]]:
    """Groups of numbers of pictures of the same size, each as large as may go through a network at once."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        by_size.setdefault(tuple(picture.pixels.shape), []).append(number)
    return [
        own[first : first + batch_of(size)]
        for size, own in by_size.items()
        for first in range(0, len(own), batch_of(size))
    ]


def _even(total: int, count: int) -> list[int]:
    """min(count, total) numbers below total, evenly spaced."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class Encoded:
    """Pictures with their latents and text embeddings.

    Attributes:
        pictures: N of them.
        mean, std: of each picture's posterior, (1, C, h, w), raw latents, float32 on the CPU.
        text: the encoded captions, by field, (1, ...), on the CPU.
        seed: the run's seed.
        unmasked_weight: weight of the area outside masks.
    """

    pictures: Sequence[Picture]
    mean: list[Tensor]
    std: list[Tensor]
    text: list[dict[str, Tensor]]
    seed: int
    unmasked_weight: float

    @classmethod
    def of(cls, config: TrainConfig, family: Family, pictures: Sequence[Picture]) -> Encoded:
        """Encodes images and captions."""
        posterior: dict[int, tuple[Tensor, ...]] = {}
        for numbers in progress(same_size(pictures), desc="encoding", unit="batch"):
            pixels = torch.stack([pictures[n].pixels for n in numbers])
            encoded = (values.split(1) for values in family.encode_images(to_float(pixels)))
            posterior.update(zip(numbers, zip(*encoded, strict=True), strict=True))
        mean, std = (list(values) for values in zip(*(posterior[n] for n in range(len(pictures))), strict=True))
        text: list[dict[str, Tensor]] = []
        for first in range(0, len(pictures), CAPTION_BATCH):
            captions = [picture.caption for picture in pictures[first : first + CAPTION_BATCH]]
            fields = family.encode_text(captions)
            text += [{name: values[n] for name, values in fields.items()} for n in range(len(captions))]
        return cls(pictures, mean, std, text, config.run.seed, config.data.unmasked_weight)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def batch(self, numbers: Sequence[int], count: int) -> Batch:
        """The batch that a training step gets for pictures of one size, at draw number `count` of each.

        Crop and caption are those of draw 0; the posterior sample is the draw's own.
        """
        pictures = [self.pictures[n] for n in numbers]
        raw = torch.cat([self.mean[n] for n in numbers]).clone()
        noise = torch.empty_like(raw)
        for own, picture in zip(noise, pictures, strict=True):
            fill_normal(own, self.seed, "posterior", picture.id, count)
        raw += noise * torch.cat([self.std[n] for n in numbers])
        mask = weights = None
        if any(picture.mask is not None for picture in pictures):
            white = torch.full((1, *raw.shape[2:]), 255, dtype=torch.uint8)
            stored = torch.stack([white if p.mask is None else p.mask for p in pictures])
            mask, weights = location_weights(stored, self.unmasked_weight)
        fields = [self.text[n] for n in numbers]
        return Batch(
            sample_ids=[picture.id for picture in pictures],
            counts=[count] * len(numbers),
            raw_latents=raw,
            text={name: padded([field[name] for field in fields]) for name in fields[0]},
            extra={"sizes": torch.tensor([p.crop.size_conditioning for p in pictures], dtype=torch.float32)},
            weights=weights,
            mask=mask,
        )
