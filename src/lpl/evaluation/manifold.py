"""Precision, recall, density and coverage: do samples lie where real images do, and do they reach all of them?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024
"""Rows of a distance matrix that are made at once."""


class Share(NamedTuple):
    """A figure, and the same for resamples of the samples."""

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
    x, y = samples.to(torch.float64), reference.to(torch.float64)
    radii, radii_of_samples = _radii(y, k), _radii(x, k)
    hit = torch.zeros(len(x), dtype=torch.bool)
    reached = torch.zeros(len(y), dtype=torch.bool)
    drawn = None if counts is None else (counts > 0).T.float()
    reached_by = []
    for at in range(0, len(y), ROWS):
        part = slice(at, at + ROWS)
        near = _squared(y[part], x)
        hit |= (near < radii[part, None]).any(0)
        inside = near < radii_of_samples
        reached[part] = inside.any(1)
        reached_by.append(_any_drawn(inside, drawn))
    return _of_samples(hit.double(), counts), _of_reference(reached, reached_by, drawn)


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5, counts: Tensor | None = None) -> tuple[Share, ...]:
    """Density and coverage.

    Density: how many reference images have a sample within the distance of their k-th nearest reference image, a
    sample on average, divided by k. Coverage: share of reference images that have any sample so near.

    Source: Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4, k = 5; "within" is strict, as in their package prdc.

    Args:
        samples: (n, d).
        reference: (m, d), m above k.
        k: which neighbour sets the radius.
        counts: (R, n), how often each sample is drawn.

    Returns:
        density (0 or more, about 1 for samples like the reference), coverage in [0, 1].
    """
    x, y = samples.to(torch.float64), reference.to(torch.float64)
    radii = _radii(y, k)
    hits = torch.zeros(len(x), dtype=torch.float64)
    covered = torch.zeros(len(y), dtype=torch.bool)
    drawn = None if counts is None else (counts > 0).T.float()
    covered_by = []
    for at in range(0, len(y), ROWS):
        part = slice(at, at + ROWS)
        inside = _squared(y[part], x) < radii[part, None]
        hits += inside.sum(0)
        covered[part] = inside.any(1)
        covered_by.append(_any_drawn(inside, drawn))
    return _of_samples(hits / k, counts), _of_reference(covered, covered_by, drawn)


def _any_drawn(inside: Tensor, drawn: Tensor | None) -> Tensor:
    """How many of the rows are reached in each resample, (R,)."""
    return torch.zeros(0) if drawn is None else (inside.float() @ drawn > 0).sum(0)


def _of_samples(each: Tensor, counts: Tensor | None) -> Share:
    return Share(float(each.mean()), None if counts is None else counts.double() @ each / len(each))


def _of_reference(reached: Tensor, by_resample: list[Tensor], drawn: Tensor | None) -> Share:
    resampled = None if drawn is None else torch.stack(by_resample).sum(0).double() / len(reached)
    return Share(float(reached.double().mean()), resampled)


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
