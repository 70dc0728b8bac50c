import pytest
import torch

from lpl.perceptual.sweep import WithGradient


def test_value_and_gradient_are_the_given_ones():
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    values, gradient = torch.tensor([1.0, 2.0, 3.0]), torch.randn(3, 2, 4, 4)
    out = WithGradient.apply(x, values, gradient)
    assert torch.equal(out, values)
    weights = torch.tensor([1.0, 0.0, -2.0])
    (got,) = torch.autograd.grad((weights * out).sum(), x)
    assert torch.equal(got, weights.view(3, 1, 1, 1) * gradient)


def test_second_derivative_is_refused_not_wrong():
    x = torch.randn(2, 1, 2, 2, requires_grad=True)
    out = WithGradient.apply(x, torch.ones(2), torch.ones(2, 1, 2, 2))
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)
