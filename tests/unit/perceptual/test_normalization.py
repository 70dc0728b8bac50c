import math

import pytest
import torch

from lpl.perceptual.normalization import NORM_TYPES, normalize

TWO_CHANNELS_X = [[[[3.0, 1.0], [0.0, 2.0]], [[4.0, 0.0], [5.0, 0.0]]]]
TWO_CHANNELS_Y = [[[[0.0, 3.0], [1.0, 8.0]], [[2.0, 4.0], [0.0, 6.0]]]]
"""Lengths over channels: 5, 1, 5, 2 and 2, 5, 1, 10."""


def both(x, y, norm_type):
    return normalize(torch.tensor(x), torch.tensor(y), norm_type)


def test_default_divides_each_by_its_own_length():
    x, y = both(TWO_CHANNELS_X, TWO_CHANNELS_Y, "default")
    torch.testing.assert_close(x, torch.tensor([[[[0.6, 1.0], [0.0, 1.0]], [[0.8, 0.0], [1.0, 0.0]]]]))
    torch.testing.assert_close(y, torch.tensor([[[[0.0, 0.6], [1.0, 0.8]], [[1.0, 0.8], [0.0, 0.6]]]]))


def test_shared_divides_both_by_the_targets_length():
    x, y = both(TWO_CHANNELS_X, TWO_CHANNELS_Y, "shared")
    torch.testing.assert_close(x, torch.tensor([[[[1.5, 0.2], [0.0, 0.2]], [[2.0, 0.0], [5.0, 0.0]]]]))
    torch.testing.assert_close(y, torch.tensor([[[[0.0, 0.6], [1.0, 0.8]], [[1.0, 0.8], [0.0, 0.6]]]]))


def test_batch_standardises_both_with_the_targets_statistics_over_batch_and_space():
    """Fails where the batch norm normalises nothing. Means 1 and 20, std sqrt(8/7) and 10 times that."""
    pattern = torch.tensor([[[0.0, 2.0], [0.0, 2.0]], [[2.0, 2.0], [0.0, 0.0]]])
    target = torch.stack([pattern, 10 * pattern + 10], dim=1)
    pred = torch.full_like(target, 5.0)
    x, y = normalize(pred, target, "batch")
    std = math.sqrt(8 / 7)
    torch.testing.assert_close(y[:, 0], (pattern - 1) / std)
    torch.testing.assert_close(y[:, 1], (pattern - 1) / std)
    torch.testing.assert_close(x[:, 0], torch.full((2, 2, 2), 4 / std))
    torch.testing.assert_close(x[:, 1], torch.full((2, 2, 2), -1.5 / std))


@pytest.mark.parametrize("norm_type", ["channel", "channel_detached"])
def test_channel_standardises_both_with_the_predictions_statistics_per_sample_and_channel(norm_type):
    """Rows: (sample 0, channel 0) mean 1 std 2; channel 1 ten times that; sample 1 mean -1 std 2 and mean 1 std 4."""
    pred = [
        [[[0.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 40.0]]],
        [[[0.0, 0.0], [-4.0, 0.0]], [[-1.0, -1.0], [7.0, -1.0]]],
    ]
    target = [[[[1.0, 3.0], [5.0, -1.0]]] * 2] * 2
    x, y = both(pred, target, norm_type)
    torch.testing.assert_close(x[0], torch.tensor([[[-0.5, -0.5], [-0.5, 1.5]]] * 2))
    torch.testing.assert_close(x[1], torch.tensor([[[0.5, 0.5], [-1.5, 0.5]], [[-0.5, -0.5], [1.5, -0.5]]]))
    torch.testing.assert_close(y[0, 0], torch.tensor([[0.0, 1.0], [2.0, -1.0]]))
    torch.testing.assert_close(y[0, 1], torch.tensor([[-0.45, -0.35], [-0.25, -0.55]]))
    torch.testing.assert_close(y[1, 0], torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    torch.testing.assert_close(y[1, 1], torch.tensor([[0.0, 0.5], [1.0, -0.5]]))


def random_pair():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), y


@pytest.mark.parametrize("norm_type", ["default", "shared", "batch", "channel"])
def test_gradient_flows_through_the_predictions_statistics(norm_type):
    x, y = random_pair()
    assert torch.autograd.gradcheck(lambda x: normalize(x, y, norm_type), x)


def test_channel_detached_has_no_gradient_through_its_statistics():
    x, y = random_pair()
    a, b = normalize(x, y, "channel_detached")
    assert not b.requires_grad
    (gradient,) = torch.autograd.grad(a.sum(), x)
    expected = 1 / (x.detach().std((2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(gradient, expected.expand_as(x))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("target_is_zero", [True, False])
def test_zeros_have_gradient_zero_not_nan(norm_type, target_is_zero):
    """All zero; and a constant prediction, whose deviation is 0, against another constant."""
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    y = torch.zeros(2, 3, 4, 4) if target_is_zero else torch.ones(2, 3, 4, 4)
    a, b = normalize(x, y, norm_type)
    assert a.isfinite().all()
    assert b.isfinite().all()
    (gradient,) = torch.autograd.grad((a - b).square().sum(), x)
    assert gradient.isfinite().all()
    if target_is_zero:
        assert (gradient == 0).all()


@pytest.mark.parametrize(("norm_type", "batch"), [("batch", 1), ("channel", 4), ("channel_detached", 4)])
def test_one_value_has_no_deviation(norm_type, batch):
    x = torch.ones(batch, 3, 1, 1)
    with pytest.raises(ValueError, match="at least 2 values"):
        normalize(x, x, norm_type)


def test_batch_takes_one_location_of_several_samples():
    _, y = both([[[[1.0]]], [[[3.0]]]], [[[[1.0]]], [[[3.0]]]], "batch")
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1.0]) / math.sqrt(2))


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        both(TWO_CHANNELS_X, TWO_CHANNELS_Y, "layer")
