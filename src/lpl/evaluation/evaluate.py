"""Every figure of one set of samples against one reference, with its interval, its floor and what limits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpl.evaluation.images import (
    BATCH,
    ImageSet,
    batches,
    interval,
    list_pictures,
    measure,
    read_picture,
    resample_counts,
)
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
"""Samples, or reference images, below which a figure is refused."""
ENOUGH = {"kernel": 500, "precision_recall": 1000, "density_coverage": 1000, "spectrum": 100}
"""Below which it is marked; for the Fréchet distance that is the number of features."""
PRECISION_K, DENSITY_K = 3, 5


class Figure(NamedTuple):
    """One metric's value, and the same for resamples."""

    value: float
    resampled: Tensor | None
    low: float
    high: float
    lower_is_better: bool


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
    read = (read_picture(file, reference.size, flag) for file in files)
    return measure(batches(read, BATCH), reference.extractor, len(files), show)


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
    """Figures of samples against a reference.

    Args:
        images: see measure_images.
        reference: statistics of real images.
        metrics: of METRICS.
        against: "images", or their "reconstructions" by the VAE, which takes the decoder's own blur out.
        resamples: of the samples, for the 95 % intervals (the reference stays as it is); 0: no intervals.
        seed: of the resamples and subsets.
        subsets: for the kernel distance; None: over all pairs.
        with_floor: also compute the floors, where the reference has any.
        show: a progress bar.

    Returns:
        By name: value (None where there are too few), interval, floor, lower_is_better, note. The names of the
        distances are the extractor's. The floor is what the figure would be for the reference's own images after the
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
        if min(len(samples), len(target)) < FEWEST[metric]:
            lower = [metric not in ("precision_recall", "density_coverage")] * len(names)
            empty = {"value": None, "interval": None, "floor": None, "note": note}
            found |= {name: empty | {"lower_is_better": low} for name, low in zip(names, lower, strict=True)}
            continue
        compute = _figures(metric, subsets, seed)
        floors = _floor(reference, floor, metric, against, compute, subsets)
        for name, figure, least in zip(names, compute(samples, target, counts), floors, strict=True):
            ends = None
            if figure.resampled is not None and math.isfinite(figure.value):
                ends = interval(figure.value, figure.resampled, figure.low, figure.high)
            found[name] = {
                "value": figure.value if math.isfinite(figure.value) else None,
                "interval": ends,
                "floor": least,
                "lower_is_better": figure.lower_is_better,
                "note": note if math.isfinite(figure.value) else "the images are too small for this band",
            }
    return found


def count_note(metric: str, samples: int, reference: int, width: int) -> str | None:
    """What there is to say of a metric at these counts; None: nothing."""
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


Compute = Callable[[ImageSet, ImageSet, Tensor | None], list[Figure]]


def _figures(metric: str, subsets: Subsets | None, seed: int) -> Compute:
    def frechet(x: ImageSet, y: ImageSet, counts: Tensor | None) -> list[Figure]:
        value = max(0.0, float(frechet_distance(x.moments, y.moments)))
        resampled = None if counts is None else frechet_distance(x.moments, y.moments, counts)
        return [Figure(value, resampled, 0.0, math.inf, True)]

    def kernel(x: ImageSet, y: ImageSet, counts: Tensor | None) -> list[Figure]:
        if subsets is not None and subsets.num:
            value = float(kernel_distance_subsets(x.features, y.features, *subsets, seed).mean())
        else:
            value = float(kernel_distance(x.features, y.features))
        resampled = None if counts is None else kernel_distance(x.features, y.features, counts)
        return [Figure(value, resampled, -math.inf, math.inf, True)]

    def precision(x: ImageSet, y: ImageSet, counts: Tensor | None) -> list[Figure]:
        found = precision_recall(x.features, y.features, PRECISION_K, counts)
        return [Figure(*share, 0.0, 1.0, False) for share in found]

    def density(x: ImageSet, y: ImageSet, counts: Tensor | None) -> list[Figure]:
        found = density_coverage(x.features, y.features, DENSITY_K, counts)
        return [Figure(*share, 0.0, high, False) for share, high in zip(found, (math.inf, 1.0), strict=True)]

    def spectrum(x: ImageSet, y: ImageSet, counts: Tensor | None) -> list[Figure]:
        mean, wanted = x.power.mean(0), y.power.mean(0)
        means = None if counts is None else counts @ x.power / len(x)
        return [
            Figure(
                float(log_error(mean, wanted, band)),
                None if means is None else log_error(means, wanted, band),
                *(0.0, math.inf, True),
            )
            for band in BANDS
        ]

    made: dict[str, Compute] = {
        "frechet": frechet,
        "kernel": kernel,
        "precision_recall": precision,
        "density_coverage": density,
        "spectrum": spectrum,
    }
    return made[metric]


def _floor(
    reference: Reference,
    sets: tuple[ImageSet, ImageSet] | None,
    metric: str,
    against: str,
    compute: Compute,
    subsets: Subsets | None,
) -> list[float | None]:
    """The floor's figures, computed once for a reference."""
    too_few = FEWEST[metric]
    if metric == "kernel" and subsets is not None and subsets.num:
        too_few = max(too_few, subsets.size)
    if sets is None or min(map(len, sets)) < too_few:
        return [None] * len(_names(metric, reference))
    key = (metric, against, subsets)
    if key not in reference.floors:
        reference.floors[key] = [figure.value for figure in compute(*sets, None)]
    return [value if math.isfinite(value) else None for value in reference.floors[key]]
