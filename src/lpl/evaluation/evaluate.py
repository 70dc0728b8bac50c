"""Every metric of one set of samples against one reference, with its interval, its floor and what limits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpl.evaluation.images import BATCH, ImageSet, interval, list_pictures, measure, read_pictures, resample_counts
from lpl.evaluation.metrics import (
    BANDS,
    density_coverage,
    frechet_distance,
    kernel_distance,
    kernel_distance_subsets,
    log_error,
    precision_recall,
)
from lpl.evaluation.reference import Reference

METRICS = ("frechet", "kernel", "precision_recall", "density_coverage", "spectrum")
FEWEST = {"frechet": 50, "kernel": 10, "precision_recall": 50, "density_coverage": 50, "spectrum": 10}
"""Samples, or reference images, below which a metric is refused."""
ENOUGH = {"kernel": 500, "precision_recall": 1000, "density_coverage": 1000, "spectrum": 100}
"""Samples, or reference images, below which a metric has a note; for the Fréchet distance the number of features."""
PRECISION_K, DENSITY_K = 3, 5


class Estimate(NamedTuple):
    """One metric's value, and the same for resamples."""

    value: float
    resampled: Tensor | None
    low: float = 0.0
    """The lower bound of the metric; high: its upper bound."""
    high: float = math.inf


class Subsets(NamedTuple):
    """The kernel distance as the mean over random subsets; num 0: over all pairs, once."""

    num: int = 0
    size: int = 1000


def measure_images(
    images: str | Path | list[Path] | Tensor | ImageSet,
    reference: Reference,
    show: bool = False,
    flag: str = "--images",
) -> ImageSet:
    """Features and spectra of samples, as those of the reference.

    Args:
        images: a folder, files, (N, 3, size, size) uint8, or what this function gave before.
        reference: sets size and network.
        show: a progress bar.
        flag: what errors call the images.

    Raises:
        UserError: no images in the folder, or files that cannot be read.
        ValueError: a tensor of another size.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.shape[1:] != (3, reference.size, reference.size):
            raise ValueError(f"expected (N, 3, {reference.size}, {reference.size}) uint8, not {tuple(images.shape)}")
        return measure(images.split(BATCH), reference.extractor, len(images), show)
    files = images if isinstance(images, list) else list_pictures(Path(images), flag)
    return measure(read_pictures(files, reference.size, flag), reference.extractor, len(files), show)


def evaluate_images(
    images: str | Path | list[Path] | Tensor | ImageSet,
    reference: Reference,
    metrics: Iterable[str] = METRICS,
    *,
    against: str = "images",
    resamples: int = 0,
    seed: int = 0,
    subsets: Subsets | None = None,
    with_floor: bool = True,
    show: bool = False,
) -> dict[str, dict[str, Any]]:
    """Metrics of samples against a reference.

    Args:
        images: see measure_images.
        reference: statistics of real images.
        metrics: of METRICS.
        against: "images", or their "reconstructions" by the VAE, which leaves the decoder's own blur out.
        resamples: of the samples, for the 95 % intervals (the reference stays as it is); 0: no intervals.
        seed: of the resamples and subsets.
        subsets: for the kernel distance; None: over all pairs.
        with_floor: also compute the floors, where the reference has any.
        show: a progress bar.

    Returns:
        By name: value (None where there are too few), interval, floor, lower_is_better, note. The names of the
        distances are the extractor's. The floor is what the metric would be for the reference's own images after the
        VAE; against reconstructions, for one half of them against the other.

    Raises:
        ValueError: subsets larger than one of the sets, or reconstructions without a VAE.
    """
    samples = measure_images(images, reference, show)
    target, floor = reference.target(against), reference.floor(against) if with_floor else None
    counts = resample_counts(len(samples), resamples, seed) if resamples else None
    found: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        names = _names(metric, reference)
        if not names:
            continue
        note = count_note(metric, len(samples), len(target), samples.features.shape[1])
        lower = metric not in ("precision_recall", "density_coverage")
        if min(len(samples), len(target)) < FEWEST[metric]:
            refused = {"value": None, "interval": None, "floor": None, "note": note, "lower_is_better": lower}
            found |= {name: dict(refused) for name in names}
            continue
        compute = partial(COMPUTE[metric], subsets=subsets, seed=seed)
        floors: list[float | None] = [None] * len(names)
        too_few = max(FEWEST[metric], subsets.size if metric == "kernel" and subsets and subsets.num else 0)
        if floor is not None and min(map(len, floor)) >= too_few:
            key = (metric, against, subsets)
            if key not in reference.floors:
                reference.floors[key] = [estimate.value for estimate in compute(*floor, None)]
            floors = [_finite(value) for value in reference.floors[key]]
        for name, estimate, least in zip(names, compute(samples, target, counts), floors, strict=True):
            value, resampled, *bounds = estimate
            finite = math.isfinite(value)
            found[name] = {
                "value": _finite(value),
                "interval": interval(value, resampled, *bounds) if finite and resampled is not None else None,
                "floor": least,
                "lower_is_better": lower,
                "note": note if finite else "the images are too small for this band",
            }
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def count_note(metric: str, samples: int, reference: int, width: int) -> str | None:
    """The note on a metric at these numbers of images; None: there is none."""
    least = min(samples, reference)
    if least < FEWEST[metric]:
        return f"refused: needs {FEWEST[metric]} images, there are {samples} and {reference} in the reference"
    if metric == "frechet" and least <= width:
        return f"biased: fewer images ({least}) than features ({width}); compare at equal counts only"
    if metric in ENOUGH and least < ENOUGH[metric]:
        return f"rough: only {least} images"
    return None


def _names(metric: str, reference: Reference) -> tuple[str, ...]:
    extractor = reference.extractor
    return {
        "frechet": (extractor.frechet_name,),
        "kernel": () if extractor.kernel_name is None else (extractor.kernel_name,),
        "precision_recall": ("precision", "recall"),
        "density_coverage": ("density", "coverage"),
        "spectrum": tuple(f"spectrum_log_error_{band}" for band in BANDS),
    }[metric]


def _frechet(x: ImageSet, y: ImageSet, counts: Tensor | None, **_: Any) -> list[Estimate]:
    value = max(0.0, float(frechet_distance(x.moments, y.moments)))
    return [Estimate(value, None if counts is None else frechet_distance(x.moments, y.moments, counts))]


def _kernel(x: ImageSet, y: ImageSet, counts: Tensor | None, subsets: Subsets | None, seed: int) -> list[Estimate]:
    if subsets is not None and subsets.num:
        value = kernel_distance_subsets(x.features, y.features, *subsets, seed).mean()
    else:
        value = kernel_distance(x.features, y.features)
    resampled = None if counts is None else kernel_distance(x.features, y.features, counts)
    return [Estimate(float(value), resampled, -math.inf)]


def _precision_recall(x: ImageSet, y: ImageSet, counts: Tensor | None, **_: Any) -> list[Estimate]:
    return [Estimate(*share, high=1.0) for share in precision_recall(x.features, y.features, PRECISION_K, counts)]


def _density_coverage(x: ImageSet, y: ImageSet, counts: Tensor | None, **_: Any) -> list[Estimate]:
    density, coverage = density_coverage(x.features, y.features, DENSITY_K, counts)
    return [Estimate(*density), Estimate(*coverage, high=1.0)]


def _spectrum(x: ImageSet, y: ImageSet, counts: Tensor | None, **_: Any) -> list[Estimate]:
    mean, wanted = x.power.mean(0), y.power.mean(0)
    means = None if counts is None else counts @ x.power / len(x)
    estimates = []
    for band in BANDS:
        resampled = None if means is None else log_error(means, wanted, band)
        estimates.append(Estimate(float(log_error(mean, wanted, band)), resampled))
    return estimates


COMPUTE: dict[str, Callable[..., list[Estimate]]] = dict(
    zip(METRICS, (_frechet, _kernel, _precision_recall, _density_coverage, _spectrum), strict=True)
)
"""How each metric is computed, from samples, target, counts of resamples, subsets and seed."""
