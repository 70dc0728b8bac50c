"""The pseudo-Huber loss and its schedules against their formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lpl.diffusion.losses import diffusion_loss, huber_threshold
from lpl.diffusion.prediction import alpha_sigma_table


def test_loss_by_hand():
    """2 c (sqrt(d^2 + c^2) - c): with c = 3, d = 4 it is 12; with c = 0.5, d = 0 and 1.2 (5-12-13) it is 0.8 / 2."""
    output = torch.tensor([[[4.0, -4.0]], [[0.0, 1.2]]])
    loss = diffusion_loss(output, torch.zeros(2, 1, 2), None, torch.tensor([3.0, 0.5]))
    assert loss.tolist() == pytest.approx([12.0, 0.4])
    weighted = diffusion_loss(output, torch.zeros(2, 1, 2), torch.tensor([2.0, 10.0]), torch.tensor([3.0, 0.5]))
    assert weighted.tolist() == pytest.approx([24.0, 4.0])


def test_it_is_the_squared_error_for_large_c_and_the_absolute_one_for_small():
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    large, small = torch.full((3,), 1e3), torch.full((3,), 1e-4)
    torch.testing.assert_close(diffusion_loss(a, b, None, large), diffusion_loss(a, b), rtol=1e-5, atol=0)
    absolute = 2e-4 * (a - b).abs().flatten(1).mean(1)
    torch.testing.assert_close(diffusion_loss(a, b, None, small), absolute, rtol=1e-3, atol=0)


def test_gradient_is_that_of_the_formula_also_at_zero():
    d = torch.tensor([[0.0, 1e-6, 0.3, -20.0]], requires_grad=True)
    (4 * diffusion_loss(d, torch.zeros(1, 4), None, torch.tensor([0.1]))).sum().backward()
    expected = [0.2 * x / math.hypot(x, 0.1) for x in d[0].tolist()]
    assert d.grad[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("c", [0.05, 0.3])
def test_schedules_by_their_formulas(c):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha, sigma = alpha_sigma_table(scheduler)
    t = torch.tensor([0, 17, 500, 999])
    at = {name: huber_threshold(name, c, t, 1000, alpha[t], sigma[t]).tolist() for name in ("exponential", "snr")}
    assert at["exponential"] == pytest.approx([math.exp(math.log(c) * x / 1000) for x in t.tolist()])
    cumprod = scheduler.alphas_cumprod.double()[t].tolist()
    noise = [((1 - x) / x) ** 0.5 for x in cumprod]
    assert at["snr"] == pytest.approx([(1 - c) / (1 + s) ** 2 + c for s in noise])
    for values in at.values():
        assert values == sorted(values, reverse=True)
    assert huber_threshold("constant", c, t, 1000, alpha[t], sigma[t]).tolist() == [c] * 4


def test_pure_noise_has_the_lowest_threshold():
    t, zero, one = torch.tensor([999]), torch.zeros(1), torch.ones(1)
    assert huber_threshold("snr", 0.2, t, 1000, zero, one).tolist() == pytest.approx([0.2])


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown huber schedule 'linear'"):
        huber_threshold("linear", 0.1, torch.zeros(1), 1000, torch.ones(1), torch.ones(1))
