"""Precision, recall, density, coverage: the package prdc on the same features, and cases known by hand."""

from __future__ import annotations

import pytest
import torch
from prdc import compute_prdc
from torch import Tensor

from lpl.evaluation import metrics
from lpl.evaluation.images import resample_counts
from lpl.evaluation.metrics import density_coverage, precision_recall


def draw(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "rows"), [(200, 150, 1024), (60, 150, 64)])
def test_equals_prdc(monkeypatch: pytest.MonkeyPatch, k: int, n: int, m: int, rows: int) -> None:
    monkeypatch.setattr(metrics, "ROWS", rows)
    samples, reference = draw(n, 0, 1.3), draw(m, 1)
    expected = compute_prdc(reference.double().numpy(), samples.double().numpy(), nearest_k=k)
    found = [
        share.value for share in (*precision_recall(samples, reference, k), *density_coverage(samples, reference, k))
    ]
    names = ("precision", "recall", "density", "coverage")
    assert found == pytest.approx([float(expected[name]) for name in names], rel=1e-4)
    assert 0.05 < found[0] < 1
    assert 0.05 < found[3] < 1


def test_extremes() -> None:
    reference = draw(100, 0)
    same = [*precision_recall(reference, reference), *density_coverage(reference, reference)]
    assert [share.value for share in same] == [1, 1, pytest.approx(1, abs=0.5), 1]
    far = [*precision_recall(draw(100, 1) + 50, reference), *density_coverage(draw(100, 1) + 50, reference)]
    assert [share.value for share in far] == [0, 0, 0, 0]
    # All samples in one place among the reference: precise, and of the reference they reach the one in their middle.
    heap = reference[:1] + draw(100, 2) * 1e-3
    precision, recall = (share.value for share in precision_recall(heap, reference))
    assert (precision, recall) == (1, 0.01)
    assert density_coverage(heap, reference)[1].value < 0.2


def test_resamples() -> None:
    samples, reference = draw(50, 0, 1.2), draw(40, 1)
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
        density_coverage(draw(20, 0), draw(5, 1))
