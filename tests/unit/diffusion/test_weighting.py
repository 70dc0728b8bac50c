"""Debiased and P2 weighting against the papers' equations, and one objective for every parameterisation."""

import pytest
import torch

from lpl.diffusion.losses import debiased_weight, diffusion_loss, p2_weight
from lpl.diffusion.prediction import add_noise, output_sensitivity, target_of, x0_from_output

KINDS = ("epsilon", "v_prediction", "sample")
SNR = [0.25, 1.0, 4.0, 900.0, 1000.0, 4000.0]


def test_debiased_by_hand():
    """1 / sqrt(SNR), no smaller than 1 / sqrt(1000); for v times SNR / (SNR + 1), for x0 times SNR."""
    snr = torch.tensor(SNR, dtype=torch.float64)
    epsilon = [2.0, 1.0, 0.5, 1 / 30, 1000**-0.5, 1000**-0.5]
    assert debiased_weight(snr, "epsilon").tolist() == pytest.approx(epsilon)
    v = [w * s / (s + 1) for w, s in zip(epsilon, SNR, strict=True)]
    assert debiased_weight(snr, "v_prediction").tolist() == pytest.approx(v)
    assert debiased_weight(snr, "sample").tolist() == pytest.approx([w * s for w, s in zip(epsilon, SNR, strict=True)])


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 1.0), (0.5, 3.0), (0.0, 1.0)])
def test_p2_by_hand(gamma, k):
    snr = torch.tensor(SNR, dtype=torch.float64)
    epsilon = [1 / (k + s) ** gamma for s in SNR]
    assert p2_weight(snr, gamma, k, "epsilon").tolist() == pytest.approx(epsilon)
    v = [w * s / (s + 1) for w, s in zip(epsilon, SNR, strict=True)]
    assert p2_weight(snr, gamma, k, "v_prediction").tolist() == pytest.approx(v)
    assert p2_weight(snr, gamma, k, "sample").tolist() == pytest.approx(
        [w * s for w, s in zip(epsilon, SNR, strict=True)]
    )


@pytest.mark.parametrize("weighting", [debiased_weight, lambda snr, kind: p2_weight(snr, 0.7, 2.0, kind)])
def test_outputs_that_imply_one_x0_have_one_loss(weighting):
    """Takes one guess of x0 and states it as each kind of output: the weighted losses are the same number."""
    latents, noise, guess = torch.randn(3, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.tensor([0.02, 0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    noisy = add_noise(latents, noise, alpha, sigma)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    implied = (noisy - a * guess) / s
    outputs = {"epsilon": implied, "v_prediction": a * implied - s * guess, "sample": guess}
    losses = []
    for kind, output in outputs.items():
        torch.testing.assert_close(x0_from_output(output, noisy, alpha, sigma, kind), guess)
        weight = weighting((alpha / sigma).square(), kind)
        losses.append(diffusion_loss(output, target_of(latents, noise, alpha, sigma, kind), weight))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_one_weight_on_the_x0_error(kind):
    """w_output = w_x0 * |dx0/do|^2, where w_x0 is the weight for sample prediction."""
    sigma = torch.tensor([0.01, 0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    snr, slope = (alpha / sigma).square(), output_sensitivity(alpha, sigma, kind).square()
    torch.testing.assert_close(debiased_weight(snr, kind), debiased_weight(snr, "sample") * slope)
    torch.testing.assert_close(p2_weight(snr, 1.0, 1.0, kind), p2_weight(snr, 1.0, 1.0, "sample") * slope)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_no_signal_has_weight_zero_not_nan(kind):
    zero = torch.zeros(1)
    assert debiased_weight(zero, kind).tolist() == [0.0]
    assert p2_weight(zero, 1.0, 1.0, kind).tolist() == [0.0]
    assert p2_weight(zero, 2.0, 0.5, "epsilon").tolist() == [4.0]


def test_flow_is_refused():
    for weighting in (debiased_weight, lambda snr, kind: p2_weight(snr, 1.0, 1.0, kind)):
        with pytest.raises(ValueError, match="not flow"):
            weighting(torch.ones(1), "flow")
