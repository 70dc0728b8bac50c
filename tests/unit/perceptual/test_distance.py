import math

import pytest
import torch

from lpl.perceptual import strips
from lpl.perceptual.convolution import rows_of
from lpl.perceptual.distance import NORM_TYPES, FeatureDistance, batch_scale

TWO_CHANNELS_X = torch.tensor([[[[3.0, 1.0], [0.0, 2.0]], [[4.0, 0.0], [5.0, 0.0]]]])
TWO_CHANNELS_Y = torch.tensor([[[[0.0, 3.0], [1.0, 8.0]], [[2.0, 4.0], [0.0, 6.0]]]])
"""Lengths over channels: 5, 1, 5, 2 and 2, 5, 1, 10."""


def measure(x, y, norm_type, loss_type="l1", inside=None, stride=8, weight=1.0, with_gradient=True):
    """The distances (B,), and weight * their gradient."""
    distance = FeatureDistance(norm_type, loss_type, stride, True, lambda f: f)
    statistics = distance.statistics(y, inside)
    scale = batch_scale([statistics]) if norm_type == "batch" else None
    grad = torch.zeros_like(x) if with_gradient else None
    return distance(x, rows_of(y), statistics, inside, scale, weight, grad), grad


def test_default_divides_each_by_its_own_length():
    """(.6, .8) (1, 0) (0, 1) (1, 0) against (0, 1) (.6, .8) (1, 0) (.8, .6)."""
    value, _ = measure(TWO_CHANNELS_X, TWO_CHANNELS_Y, "default")
    torch.testing.assert_close(value, torch.tensor([(0.8 + 1.2 + 2.0 + 0.8) / 8]))


def test_shared_divides_both_by_the_targets_length():
    """Differences (3, 2) (2, 4) (1, 5) (6, 6) over 2, 5, 1, 10."""
    value, _ = measure(TWO_CHANNELS_X, TWO_CHANNELS_Y, "shared")
    torch.testing.assert_close(value, torch.tensor([(5 / 2 + 6 / 5 + 6 + 12 / 10) / 8]))
    value, _ = measure(TWO_CHANNELS_X, TWO_CHANNELS_Y, "shared", "mse")
    torch.testing.assert_close(value, torch.tensor([(13 / 4 + 20 / 25 + 26 + 72 / 100) / 8]))


def test_batch_divides_by_the_targets_deviation_over_batch_and_space():
    """Fails where the batch norm normalises nothing. Std sqrt(8/7) and 10 times that; means 1 and 20."""
    pattern = torch.tensor([[[0.0, 2.0], [0.0, 2.0]], [[2.0, 2.0], [0.0, 0.0]]])
    target = torch.stack([pattern, 10 * pattern + 10], dim=1)
    pred = target + torch.tensor([3.0, 20.0]).view(1, 2, 1, 1)
    value, _ = measure(pred, target, "batch")
    torch.testing.assert_close(value, torch.full((2,), (3 + 2) / math.sqrt(8 / 7) / 2))


def test_batch_statistics_of_several_chunks_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, 3, 6, 7, generator=generator) * 3 + torch.randn(5, 1, 1, 1, generator=generator) * 20
    distance = FeatureDistance("batch", "mse", 8, True, lambda f: f)
    parts = [distance.statistics(part, None) for part in y.split(2)]
    expected = 1 / (y.std((0, 2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(batch_scale(parts), expected)


@pytest.mark.parametrize("norm_type", ["channel", "channel_detached"])
def test_channel_divides_by_the_predictions_deviation_per_sample_and_channel(norm_type):
    """Deviations of the prediction, dividing by n - 1: 2 and 20 in sample 0, 2 and 4 in sample 1."""
    pred = torch.tensor(
        [
            [[[0.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 40.0]]],
            [[[0.0, 0.0], [-4.0, 0.0]], [[-1.0, -1.0], [7.0, -1.0]]],
        ]
    )
    value, _ = measure(pred, pred + 1, norm_type)
    torch.testing.assert_close(value, torch.tensor([(1 / 2 + 1 / 20) / 2, (1 / 2 + 1 / 4) / 2]))


def test_own_standardises_each_side_by_itself():
    """(0, 0, 0, 4): mean 1, deviation 2, so (-1/2, -1/2, -1/2, 3/2), whatever the target's contrast and level."""
    pred = torch.tensor([[[[0.0, 0.0], [0.0, 4.0]]]])
    target = torch.tensor([[[[0.0, 40.0], [0.0, 0.0]]]]) + 7
    value, _ = measure(pred, target, "own")
    torch.testing.assert_close(value, torch.tensor([(2 + 2) / 4]))
    assert measure(pred, 3 * pred + 5, "own", "mse")[0] < 1e-10


def random_pair(dtype=torch.float64, size=(12, 5)):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, *size, generator=generator, dtype=dtype) for _ in range(2))
    y[:, :, 2, 2] = 40.0
    return x, y


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("loss_type", ["mse", "l1"])
@pytest.mark.parametrize("norm_type", ["default", "shared", "batch", "channel", "own"])
def test_gradient_is_the_derivative_of_the_value(norm_type, loss_type, stride):
    """By differences, through the prediction's statistics, with the outlier mask (stride 1) and without."""
    x, y = random_pair()
    inside = torch.rand(2, 1, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inside[inside < 0.3] = 0
    _, grad = measure(x, y, norm_type, loss_type, inside, stride)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    step = 1e-6
    ahead, behind = (
        measure(x + sign * step * direction, y, norm_type, loss_type, inside, stride)[0] for sign in (1, -1)
    )
    expected = (grad * direction).sum((1, 2, 3))
    torch.testing.assert_close((ahead - behind) / (2 * step), expected, rtol=1e-6, atol=1e-9)


def test_channel_detached_has_no_gradient_through_its_statistics():
    x, y = random_pair()
    _, grad = measure(x, y, "channel_detached")
    expected = (x - y).sign() / (x.std((2, 3), keepdim=True) + 1e-6) / x[0].numel()
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_strips_change_nothing(monkeypatch, norm_type):
    """Rows taken two at a time give what the whole map gives, masks and halos included."""
    x, y = random_pair(size=(13, 9))
    inside = torch.rand(2, 1, 13, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = measure(x, y, norm_type, "mse", inside, stride=1)
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": 1})
    assert len(strips.spans(x)) == 7
    parts = measure(x, y, norm_type, "mse", inside, stride=1)
    torch.testing.assert_close(parts, whole)


def test_gradient_is_weighted_and_added():
    x, y = random_pair()
    _, once = measure(x, y, "shared")
    distance = FeatureDistance("shared", "l1", 8, True, lambda f: f)
    statistics = distance.statistics(y, None)
    grad = torch.ones_like(x)
    distance(x, rows_of(y), statistics, None, None, 0.25, grad)
    torch.testing.assert_close(grad, 1 + 0.25 * once)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("target_is_zero", [True, False])
def test_zeros_have_gradient_zero_not_nan(norm_type, target_is_zero):
    """All zero; and a constant prediction, whose deviation is 0, against another constant."""
    x = torch.zeros(2, 3, 4, 4)
    y = torch.zeros(2, 3, 4, 4) if target_is_zero else torch.ones(2, 3, 4, 4)
    value, gradient = measure(x, y, norm_type, "mse")
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if target_is_zero:
        assert (value == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("branch", ["prediction", "target"])
def test_what_is_not_finite_is_seen(branch, stride):
    """Also where the mask would hide it: an infinite target makes every bound NaN, and all of its channel outliers."""
    x, y = random_pair(torch.float32)
    (x if branch == "prediction" else y)[0, 1, 3, 3] = torch.inf
    value, _ = measure(x, y, "shared", stride=stride)
    assert value.isfinite().tolist() == [False, True]


@pytest.mark.parametrize(("norm_type", "batch"), [("batch", 1), ("channel", 4), ("channel_detached", 4), ("own", 4)])
def test_one_value_has_no_deviation(norm_type, batch):
    x = torch.ones(batch, 3, 1, 1)
    with pytest.raises(ValueError, match="at least 2 values"):
        measure(x, x, norm_type)


def test_batch_takes_one_location_of_several_samples():
    y = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    value, _ = measure(y + 1, y, "batch")
    torch.testing.assert_close(value, torch.full((2,), 1 / math.sqrt(2)))
