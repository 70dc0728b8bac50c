"""Fréchet and kernel distance between two sets of features, in float64."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lpl.diffusion.draws import keyed_generator

ROWS = 1024
"""Rows of a kernel matrix that are made at once."""


class Moments:
    """Mean and covariance of features, and what of them is used again and again.

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

    With C2 = F F^T the last trace is the sum of the roots of the eigenvalues of F^T C1 F, which is symmetric.
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
        inner = projected.T @ projected / (size - 1)
        shift = (samples.mean - reference.mean).square().sum()
        return shift + samples.trace + reference.trace - 2 * _root_trace(inner)
    lengths = samples.centred.square().sum(1)
    found = []
    for row in counts.to(torch.float64):
        mean, mean_projected = row @ samples.centred / size, row @ projected / size
        used = row > 0
        part = projected[used] * row[used, None].sqrt()
        inner = (part.T @ part - size * torch.outer(mean_projected, mean_projected)) / (size - 1)
        trace = (row @ lengths - size * mean.square().sum()) / (size - 1)
        shift = (samples.mean + mean - reference.mean).square().sum()
        found.append(shift + trace + reference.trace - 2 * _root_trace(inner))
    return torch.stack(found)


def _root_trace(symmetric: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric).clamp(min=0).sqrt().sum()


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
    # A sample drawn w times meets itself w (w - 1) times, as another draw; with itself it does not count.
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
