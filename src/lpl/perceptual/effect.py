"""LPL's gradient at the model's output against the diffusion loss's; 95 % intervals, by bootstrap over samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lpl.diffusion.draws import keyed_generator

INFORMED = 0.5
"""LPL's distance, relative to that of an estimate that knows nothing, below which an estimate counts as informative."""
RESAMPLES = 1000
LEAST = 5
"""Fewest samples for a bootstrap: with one, it would draw that one each time."""
LOW, HIGH = 0.025, 0.975


class Gradients(NamedTuple):
    """Two losses' gradients at the model's output, per sample; (B,), float64, on the CPU."""

    lpl_square: Tensor
    """|g|^2 of scale * L, at weight 1."""
    diffusion_square: Tensor
    cosine: Tensor
    """0 where one of the two is 0."""


def compared(lpl: Tensor, diffusion: Tensor) -> Gradients:
    """Compares two gradients, (B, ...) each, sample by sample."""
    lpl, diffusion = (gradient.flatten(1).cpu().double() for gradient in (lpl, diffusion))
    lpl_square, diffusion_square = lpl.square().sum(1), diffusion.square().sum(1)
    lengths = (lpl_square * diffusion_square).sqrt()
    cosine = torch.where(lengths > 0, (lpl * diffusion).sum(1) / lengths, 0)
    return Gradients(lpl_square, diffusion_square, cosine)


class Weight(NamedTuple):
    """A weight with its 95 % interval; all NaN where LPL has no gradient, the interval also with too few samples."""

    value: float
    low: float
    high: float
    over: str = "pictures"
    """What the interval is over."""

    @property
    def interval(self) -> list[float] | None:
        """[low, high] for JSON; None without an interval."""
        return None if math.isnan(self.low) else [self.low, self.high]

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3g} (from fewer than {LEAST} {self.over}: no interval)"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}, 95 % interval over {self.over})"


def resampled(count: int, seed: int) -> Tensor:
    """Indices of the samples in each bootstrap sample, (RESAMPLES, count)."""
    generator = keyed_generator(seed, "check_bootstrap")
    return torch.randint(count, (RESAMPLES, count), generator=generator)


def interval(samples: Tensor) -> tuple[float, float]:
    """The 95 % interval of bootstrap values; NaN if one is."""
    bounds = torch.quantile(samples, torch.tensor([LOW, HIGH], dtype=samples.dtype))
    return float(bounds[0]), float(bounds[1])


def mean_interval(values: Tensor, seed: int) -> tuple[float, float, float]:
    """The mean of values (N,), with its 95 % interval."""
    return float(values.mean()), *interval(values[resampled(len(values), seed)].mean(1))


def ratio_interval(own: Tensor, of: Tensor, seed: int) -> tuple[float, float, float]:
    """The ratio of two means, of values (N,) of the same N samples, with its 95 % interval."""
    chosen = resampled(len(own), seed)
    return float(own.mean() / of.mean()), *interval(own[chosen].mean(1) / of[chosen].mean(1))
