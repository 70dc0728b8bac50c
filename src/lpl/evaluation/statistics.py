"""What is kept of a set of images: features and power spectra, image by image; and counts of its resamples."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from lpl.diffusion.draws import keyed_generator
from lpl.evaluation.distances import Moments
from lpl.evaluation.features import Extractor
from lpl.evaluation.spectrum import power_spectrum
from lpl.progress import progress

BATCH = 16
"""Images whose features are computed together: larger batches leave a CPU's caches."""


class ImageSet:
    """Features and power spectra of images.

    Args:
        features: (N, d), float32.
        power: (N, F), float64.
    """

    def __init__(self, features: Tensor, power: Tensor) -> None:
        self.features, self.power = features, power

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
    """Features and power spectra of images.

    Args:
        images: batches (B, 3, H, H), uint8.
        extractor: the network.
        total: number of images, for the progress bar.
        show: a progress bar.
    """
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
    """95 % bootstrap interval: quantiles of the resampled figures, shifted so that their mean is the value.

    A resample repeats samples, which makes distances larger and shares smaller than they are: without the shift, the
    interval may not hold the value itself.

    Args:
        value: of all samples.
        resampled: (R,).
        low, high: what the figure cannot leave.
    """
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [min(max(float(end) - float(resampled.mean()) + value, low), high) for end in ends]
