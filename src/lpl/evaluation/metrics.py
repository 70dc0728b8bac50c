"""Metrics of two sets: Fréchet and kernel distance, precision and recall, density and coverage, the power spectrum."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lpl.diffusion.draws import keyed_generator

ROWS = 1024
"""Rows of a kernel matrix that are made at once."""


class Moments:
    """Mean and covariance of features, and what is computed once from them.

    Args:
        features: (N, d), N at least 2, any float dtype.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features.to(torch.float64)
        self.mean = self.features.mean(0)
        """(d,)"""

    @cached_property
    def centred(self) -> Tensor:
        """The features less their mean, (N, d)."""
        return self.features - self.mean

    @cached_property
    def trace(self) -> Tensor:
        """Trace of the covariance (unbiased, N - 1)."""
        return self.centred.square().sum() / (len(self.features) - 1)

    @cached_property
    def root(self) -> Tensor:
        """F, (d, r), with F F^T the covariance (unbiased, N - 1) and r at most min(d, N - 1)."""
        count, width = self.features.shape
        if count > width:
            values, vectors = torch.linalg.eigh(self.centred.T @ self.centred / (count - 1))
            return vectors * values.clamp(min=0).sqrt()
        values, vectors = torch.linalg.eigh(self.centred @ self.centred.T / (count - 1))
        values, vectors = values[1:], vectors[:, 1:]  # the smallest is 0: the mean is taken out
        return self.centred.T @ vectors / (count - 1) ** 0.5 if len(values) else self.centred.T[:, :0]


def frechet_distance(samples: Moments, reference: Moments, counts: Tensor | None = None) -> Tensor:
    """Fréchet distance between Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C2 = F F^T and C1 = X^T X / (N - 1) the last trace is the sum of the singular values of X F / (N - 1)^(1/2).
    Covariances are unbiased (N - 1), as in torchmetrics and in the code of the source.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), eq. 6. Only in features of their Inception
    network is it the FID.

    Args:
        samples: N of them.
        reference: the other set.
        counts: (R, N), how often each sample is drawn, each row summing to N: a distance for each of R resamples.

    Returns:
        float64, a scalar, or (R,) with counts; at least 0 up to rounding, unit of the features squared. Estimated from
        few samples it is too large, the more so the fewer there are: compare at equal numbers only.
    """
    projected = samples.centred @ reference.root
    size = len(projected)
    if counts is None:
        shift = (samples.mean - reference.mean).square().sum()
        return shift + samples.trace + reference.trace - 2 * _sum_of_singular_values(projected, size - 1)
    lengths = samples.centred.square().sum(1)
    found = []
    for row in counts.to(torch.float64):
        mean, mean_projected = row @ samples.centred / size, row @ projected / size
        used = row > 0
        part = (projected[used] - mean_projected) * row[used, None].sqrt()
        trace = (row @ lengths - size * mean.square().sum()) / (size - 1)
        shift = (samples.mean + mean - reference.mean).square().sum()
        found.append(shift + trace + reference.trace - 2 * _sum_of_singular_values(part, size - 1))
    return torch.stack(found)


def _sum_of_singular_values(x: Tensor, divisor: int) -> Tensor:
    """Of x / divisor^(1/2), by the smaller of its two Gram matrices."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram / divisor).clamp(min=0).sqrt().sum()


def kernel_distance(samples: Tensor, reference: Tensor, counts: Tensor | None = None) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, over all pairs.

    sum over i != j of k(xi, xj) / (n (n - 1)) + the same of y - 2 * mean of k(xi, yj).

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012, eq. 3. Only in features of the
    Inception network of the FID is it the KID.

    Args:
        samples: (n, d), n at least 2.
        reference: (m, d), m at least 2.
        counts: (R, n), see frechet_distance.

    Returns:
        float64, a scalar, or (R,) with counts; may fall below 0.
    """
    x, y = samples.to(torch.float64), reference.to(torch.float64)
    rows = torch.ones(1, len(x), dtype=torch.float64) if counts is None else counts.to(torch.float64)
    within, across = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for at in range(0, len(x), ROWS):
        part = slice(at, at + ROWS)
        across += rows[:, part] @ _kernel(x[part], y).mean(1)
        within += ((rows[:, part] @ _kernel(x[part], x)) * rows).sum(1)
    # A sample drawn w times is paired w (w - 1) times with its other draws; a draw is not paired with itself.
    within -= rows @ _kernel_of_itself(x)
    value = within / (len(x) * (len(x) - 1)) + _within(y) - 2 * across / len(x)
    return value[0] if counts is None else value


def kernel_distance_subsets(samples: Tensor, reference: Tensor, num: int, size: int, seed: int = 0) -> Tensor:
    """kernel_distance of `num` pairs of random subsets of `size` features each; (num,), float64.

    Raises:
        ValueError: a subset larger than one of the sets, or smaller than 2.
    """
    if not 2 <= size <= min(len(samples), len(reference)):
        raise ValueError(f"subsets of {size} from {len(samples)} and {len(reference)} features")
    found = []
    for n in range(num):
        chosen = [
            f[torch.randperm(len(f), generator=keyed_generator(seed, "subset", side, n))[:size]]
            for side, f in enumerate((samples, reference))
        ]
        found.append(kernel_distance(*chosen))
    return torch.stack(found)


def _within(y: Tensor) -> Tensor:
    total = sum(_kernel(y[at : at + ROWS], y).sum() for at in range(0, len(y), ROWS))
    return (total - _kernel_of_itself(y).sum()) / (len(y) * (len(y) - 1))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_itself(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


class Share(NamedTuple):
    """A value, and the same for resamples of the samples."""

    value: float
    resampled: Tensor | None
    """(R,), float64; None where no counts were given."""


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3, counts: Tensor | None = None) -> tuple[Share, ...]:
    """Improved precision and recall.

    Precision: share of samples that lie nearer to some reference image than its k-th nearest reference image does.
    Recall: the same with the roles exchanged.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2, k = 3; "nearer" is strict, as in the package prdc.

    Args:
        samples: (n, d), n above k.
        reference: (m, d), m above k.
        k: which neighbour sets the radius.
        counts: (R, n), how often each sample is drawn. In recall, samples that are not drawn are left out and those
            that are keep their radius: among repeated samples it would be 0.

    Returns:
        precision, recall; each in [0, 1].
    """
    hits, recall = _neighbours(samples, reference, k, counts, by_samples=True)
    return _over_samples((hits > 0).double(), counts), recall


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5, counts: Tensor | None = None) -> tuple[Share, ...]:
    """Density and coverage.

    Density: number of reference images that have a sample within the distance of their k-th nearest reference image,
    averaged over samples and divided by k. Coverage: share of reference images that have any sample so near.

    Source: Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4, k = 5; "within" is strict, as in their package prdc.

    Args:
        samples: (n, d).
        reference: (m, d), m above k.
        k: which neighbour sets the radius.
        counts: (R, n), how often each sample is drawn.

    Returns:
        density (0 or more, about 1 for samples like the reference), coverage in [0, 1].
    """
    hits, coverage = _neighbours(samples, reference, k, counts, by_samples=False)
    return _over_samples(hits / k, counts), coverage


def _neighbours(
    samples: Tensor, reference: Tensor, k: int, counts: Tensor | None, by_samples: bool
) -> tuple[Tensor, Share]:
    """Of how many reference images each sample is a neighbour, (n,), and the share of reference images reached.

    A reference image is reached by a sample within its own radius, or with `by_samples` within the sample's.
    """
    x, y = samples.to(torch.float64), reference.to(torch.float64)
    radii, radii_of_samples = _radii(y, k), _radii(x, k) if by_samples else None
    drawn = None if counts is None else (counts > 0).T.float()
    hits, reached, resampled = torch.zeros(len(x), dtype=torch.float64), 0, []
    for at in range(0, len(y), ROWS):
        part = slice(at, at + ROWS)
        squared = _squared(y[part], x)
        inside = squared < radii[part, None]
        hits += inside.sum(0)
        if radii_of_samples is not None:
            inside = squared < radii_of_samples
        reached += int(inside.any(1).sum())
        if drawn is not None:
            resampled.append((inside.float() @ drawn > 0).sum(0))
    return hits, Share(reached / len(y), torch.stack(resampled).sum(0).double() / len(y) if resampled else None)


def _over_samples(each: Tensor, counts: Tensor | None) -> Share:
    return Share(float(each.mean()), None if counts is None else counts.double() @ each / len(each))


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} features have no {k}-th nearest other")
    found = []
    for at in range(0, len(x), ROWS):
        near = _squared(x[at : at + ROWS], x)
        near[torch.arange(len(near)), torch.arange(at, at + len(near))] = float("inf")
        found.append(near.kthvalue(k, 1).values)
    return torch.cat(found)


BANDS = {"low": (0.0, 0.125), "middle": (0.125, 0.25), "high": (0.25, 0.5)}
"""Cycles per pixel, lower end excluded: from the largest shapes to the finest grain, the last two an octave each."""

FLOOR = 1e-9
"""Power below this counts as this; the rounding of 8-bit images has 1.3e-6."""

LUMA = (0.299, 0.587, 0.114)


def frequencies(size: int) -> Tensor:
    """Centres of the rings, (size // 2,), cycles per pixel: 1 / size up to 1/2."""
    return torch.arange(1, size // 2 + 1, dtype=torch.float64) / size


def power_spectrum(images: Tensor) -> Tensor:
    """Power of the luma at each frequency, averaged over the ring of whole waves per image nearest to it.

    P(f) = mean over |k| ~ f of |FFT(w (x - mean x))(k)|^2 / sum w^2, w a Hann window: without it the image's opposite
    edges, which do not match, would fill all frequencies. White noise of variance v has P = v at every frequency.

    Args:
        images: (B, 3, H, H), uint8 0..255 or floats of that range, square.

    Returns:
        (B, H // 2), float64, for values in [0, 1].
    """
    size = images.shape[-1]
    luma = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    values = (images.to(torch.float64) / 255 * luma[:, None, None]).sum(1)
    values = values - values.mean((1, 2), keepdim=True)
    window = torch.hann_window(size, periodic=True, dtype=torch.float64, device=images.device)
    window = window[:, None] * window
    power = torch.fft.fft2(values * window).abs().square() / window.square().sum()
    ring = _rings(size).to(images.device)
    rings = size // 2
    inside = (ring >= 1) & (ring <= rings)
    total = torch.zeros(len(images), rings + 1, dtype=torch.float64, device=images.device)
    total.index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return total[:, 1:] / torch.bincount(ring[inside], minlength=rings + 1)[1:]


def _rings(size: int) -> Tensor:
    waves = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    return torch.sqrt(waves[:, None].square() + waves.square()).round().long().flatten()


def log_error(power: Tensor, reference: Tensor, band: str) -> Tensor:
    """Mean over a band's frequencies of |ln P - ln P_reference|; 0.1 is 10 % of power.

    Args:
        power: (..., F), mean over the images.
        reference: (F,), the same of the reference.
        band: a key of BANDS.

    Returns:
        (...,), 0 or more; NaN where images are too small to have a frequency in the band.
    """
    low, high = BANDS[band]
    # F rings: frequency n / size with size = 2 F or 2 F + 1; the difference does not move a ring to another band.
    at = torch.arange(1, len(reference) + 1, dtype=torch.float64) / (2 * len(reference))
    inside = (at > low) & (at <= high)
    error = (power[..., inside].clamp(min=FLOOR).log() - reference[inside].clamp(min=FLOOR).log()).abs()
    return error.mean(-1)
