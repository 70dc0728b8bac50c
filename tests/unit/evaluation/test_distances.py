"""Metrics of features: closed forms, torchmetrics, scipy and prdc on the same features, cases by hand, resamples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lpl.evaluation import metrics
from lpl.evaluation.images import interval, resample_counts
from lpl.evaluation.metrics import (
    Moments,
    density_coverage,
    frechet_distance,
    kernel_distance,
    kernel_distance_subsets,
    precision_recall,
)


class Flat(nn.Module):
    """Features that are the pixels themselves."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def draw(count: int, seed: int, shift: float = 0.0, width: int = 12) -> Tensor:
    """Correlated features between 0 and 255, whole numbers, so that they pass as images."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    values = torch.randn(count, width, generator=generator) @ mixing * 12 + 120 + shift
    return values.round().clamp(0, 255)


def images(features: Tensor) -> Tensor:
    return features.to(torch.uint8).reshape(-1, 3, 2, 2)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (9, 200), (200, 9), (8, 7)])
def test_frechet_equals_torchmetrics_and_scipy(n: int, m: int) -> None:
    x, y = draw(n, 0), draw(m, 1, shift=9)
    found = float(frechet_distance(Moments(x), Moments(y)))
    metric = FrechetInceptionDistance(Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(images(x), real=False)
    metric.update(images(y), real=True)
    assert found == pytest.approx(float(metric.compute()), rel=1e-4)
    a, b = (np.cov(v.double().numpy(), rowvar=False) for v in (x, y))
    tiny = 1e-10 * np.eye(12)
    root = scipy.linalg.sqrtm((a + tiny) @ (b + tiny)).real
    shift = np.square(x.double().mean(0).numpy() - y.double().mean(0).numpy()).sum()
    assert found == pytest.approx(shift + np.trace(a + b - 2 * root), rel=1e-4)


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    """Independent components: sum of (m1 - m2)^2 + (s1 - s2)^2, with the sample's own moments exactly so."""
    white = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = Moments(white).centred
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / 499)).T
    first, second = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([2.0, 2, 5, 1, 5, 9])
    found = frechet_distance(Moments(white * first + 1), Moments(white * second + 3))
    assert float(found) == pytest.approx(6 * 4 + 1 + 0 + 4 + 9 + 0 + 9, rel=1e-9)
    assert abs(float(frechet_distance(Moments(white), Moments(white)))) < 1e-9


def test_kernel_over_all_equals_torchmetrics() -> None:
    x, y = draw(120, 0), draw(120, 1, shift=9)
    metric = KernelInceptionDistance(Flat(), subsets=1, subset_size=120)
    metric.set_dtype(torch.float64)
    metric.update(images(x), real=False)
    metric.update(images(y), real=True)
    expected = float(metric.compute()[0])
    assert abs(expected) > 1
    assert float(kernel_distance(x, y)) == pytest.approx(expected, rel=1e-4)


def test_kernel_is_the_sum_over_pairs_and_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(7, 0)[:, :3] / 50, draw(5, 1)[:, :3] / 50
    k = lambda a, b: float(a.double() @ b.double() / 3 + 1) ** 3  # noqa: E731
    within = [sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) for s in (x, y)]
    across = sum(k(a, b) for a in x for b in y)
    expected = within[0] / 42 + within[1] / 20 - 2 * across / 35
    assert float(kernel_distance(x, y)) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "ROWS", 3)
    assert float(kernel_distance(x, y)) == pytest.approx(expected, rel=1e-9)
    same = [float(kernel_distance(draw(60, 2 * s) / 100, draw(60, 2 * s + 1) / 100)) for s in range(40)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 3 * np.std(same) / 40**0.5


def test_kernel_of_subsets_averages_to_that_of_all() -> None:
    x, y = draw(150, 0), draw(180, 1, shift=9)
    found = kernel_distance_subsets(x, y, num=60, size=50)
    assert found.shape == (60,)
    error = float(found.std()) / 60**0.5
    assert abs(float(found.mean() - kernel_distance(x, y))) < 4 * error
    assert torch.equal(kernel_distance_subsets(x, y, 2, 50), found[:2])
    whole = kernel_distance_subsets(x, y[:150], 1, 150)
    assert float(whole) == pytest.approx(float(kernel_distance(x, y[:150])), rel=1e-9)
    with pytest.raises(ValueError, match="subsets of 151"):
        kernel_distance_subsets(x, y, 1, 151)


@pytest.mark.parametrize("m", [40, 6])
def test_resampled_distances_are_those_of_the_resampled_features(m: int) -> None:
    x, y = draw(30, 0), draw(m, 1, shift=4)
    counts = resample_counts(30, 3, seed=5)
    assert counts.sum(1).tolist() == [30.0] * 3
    frechet = frechet_distance(Moments(x), Moments(y), counts)
    kernel = kernel_distance(x, y, counts)
    for row, a, b in zip(counts, frechet, kernel, strict=True):
        chosen = x.repeat_interleave(row.long(), 0)
        assert float(a) == pytest.approx(float(frechet_distance(Moments(chosen), Moments(y))), rel=1e-6)
        assert float(b) == pytest.approx(float(kernel_distance(chosen, y)), rel=1e-9)


def test_interval_holds_the_value_and_covers_the_truth() -> None:
    """The distance of two Gaussians at a size where its own bias is small: the interval should hold it about 95 %."""
    generator = torch.Generator().manual_seed(0)
    reference = Moments(torch.randn(20000, 2, generator=generator))
    hits = 0
    for seed in range(100):
        x = torch.randn(400, 2, generator=generator) + torch.tensor([1.0, 0])
        found = Moments(x)
        value = float(frechet_distance(found, reference))
        low, high = interval(value, frechet_distance(found, reference, resample_counts(400, 100, seed)), 0.0)
        assert low < value < high
        hits += low < 1.0 < high
    assert 86 <= hits <= 100


def noise(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "rows"), [(200, 150, 1024), (60, 150, 64)])
def test_equals_prdc(monkeypatch: pytest.MonkeyPatch, k: int, n: int, m: int, rows: int) -> None:
    monkeypatch.setattr(metrics, "ROWS", rows)
    samples, reference = noise(n, 0, 1.3), noise(m, 1)
    expected = compute_prdc(reference.double().numpy(), samples.double().numpy(), nearest_k=k)
    found = [
        share.value for share in (*precision_recall(samples, reference, k), *density_coverage(samples, reference, k))
    ]
    names = ("precision", "recall", "density", "coverage")
    assert found == pytest.approx([float(expected[name]) for name in names], rel=1e-4)
    assert 0.05 < found[0] < 1
    assert 0.05 < found[3] < 1


def test_extremes() -> None:
    reference = noise(100, 0)
    same = [*precision_recall(reference, reference), *density_coverage(reference, reference)]
    assert [share.value for share in same] == [1, 1, pytest.approx(1, abs=0.5), 1]
    far = [*precision_recall(noise(100, 1) + 50, reference), *density_coverage(noise(100, 1) + 50, reference)]
    assert [share.value for share in far] == [0, 0, 0, 0]
    # All samples in one place among the reference: precise, and of the reference they reach the one in their middle.
    heap = reference[:1] + noise(100, 2) * 1e-3
    precision, recall = (share.value for share in precision_recall(heap, reference))
    assert (precision, recall) == (1, 0.01)
    assert density_coverage(heap, reference)[1].value < 0.2


def test_resamples() -> None:
    samples, reference = noise(50, 0, 1.2), noise(40, 1)
    counts = resample_counts(50, 4, 0)
    precision, recall = precision_recall(samples, reference, 3, counts)
    density, coverage = density_coverage(samples, reference, 5, counts)
    for r, row in enumerate(counts):
        # What counts samples one by one, or takes only the reference's radii, is that of the repeated samples.
        repeated = samples.repeat_interleave(row.long(), 0)
        assert float(precision.resampled[r]) == pytest.approx(precision_recall(repeated, reference, 3)[0].value)
        expected = [share.value for share in density_coverage(repeated, reference, 5)]
        assert [float(density.resampled[r]), float(coverage.resampled[r])] == pytest.approx(expected)
        assert float(recall.resampled[r]) <= recall.value
    all_drawn = precision_recall(samples, reference, 3, torch.ones(1, 50))[1]
    assert float(all_drawn.resampled[0]) == pytest.approx(all_drawn.value)


def test_too_few() -> None:
    with pytest.raises(ValueError, match="5 features have no 5-th nearest other"):
        density_coverage(noise(20, 0), noise(5, 1))
