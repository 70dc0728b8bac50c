import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lpl.diffusion.prediction import (
    PREDICTION_TYPES,
    add_noise,
    alpha_sigma_table,
    expand,
    output_sensitivity,
    signal_to_noise,
    target_of,
    x0_from_output,
)


def process(prediction_type, dtype=torch.float64, size=6):
    """Latents, noise, alpha, sigma and the noisy latents; no coefficient is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, size, 4, 3, 5, generator=generator, dtype=torch.float64)
    sigma = torch.linspace(0.05, 0.95, size, dtype=torch.float64)
    alpha = 1 - sigma if prediction_type.startswith("flow") else (1 - sigma**2).sqrt()
    values = (latents, noise, alpha, sigma, add_noise(latents, noise, alpha, sigma))
    return [x.to(dtype) for x in values]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x0_of_the_target_is_the_latent(prediction_type):
    """Round trip in double precision: fails where noise is taken from a `sample` prediction, or a sign is wrong."""
    latents, noise, alpha, sigma, noisy = process(prediction_type)
    target = target_of(latents, noise, alpha, sigma, prediction_type)
    assert (x0_from_output(target, noisy, alpha, sigma, prediction_type) - latents).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("prediction_type", "target", "x0"),
    [
        ("epsilon", 3.0, (2.4 - 0.8) / 0.6),
        ("v_prediction", 0.6 * 3 - 0.8 * 2, 0.6 * 2.4 - 0.8),
        ("sample", 2.0, 1.0),
        ("flow", 1.0, 2.4 - 0.8),
        ("flow_to_data", -1.0, 2.4 + 0.8),
    ],
)
def test_values_by_hand(prediction_type, target, x0):
    """The target of x0 = 2 and eps = 3, and x0 of the output 1 from the noisy 2.4, at alpha = 0.6, sigma = 0.8."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    assert target_of(2 * one, 3 * one, alpha, sigma, prediction_type).item() == pytest.approx(target)
    assert x0_from_output(one, 2.4 * one, alpha, sigma, prediction_type).item() == pytest.approx(x0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_sensitivity_is_the_derivative_of_x0(prediction_type):
    latents, _, alpha, sigma, noisy = process(prediction_type)
    output = torch.randn_like(latents).requires_grad_()
    x0 = x0_from_output(output, noisy, alpha, sigma, prediction_type)
    (derivative,) = torch.autograd.grad(x0.sum(), output)
    expected = output_sensitivity(alpha, sigma, prediction_type)
    torch.testing.assert_close(derivative.abs(), expand(expected, latents).expand_as(latents))
    assert expected.shape == (6,)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_noisy_latents_are_refused(prediction_type, dtype):
    _, noise, alpha, sigma, noisy = process(prediction_type, torch.float32)
    with pytest.raises(ValueError, match="x0 needs the float32 ones, not their cast"):
        x0_from_output(noise, noisy.to(dtype), alpha, sigma, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_output_meets_the_float32_noisy_latent(prediction_type, dtype):
    """Fails where x0 is computed from the half-precision cast of the noisy latent."""
    latents, noise, alpha, sigma, noisy = process(prediction_type, torch.float32)
    output = target_of(latents, noise, alpha, sigma, prediction_type).to(dtype)
    x0 = x0_from_output(output, noisy, alpha, sigma, prediction_type)
    exact = x0_from_output(output.double(), noisy.double(), alpha.double(), sigma.double(), prediction_type)
    assert x0.dtype == torch.float32
    assert (x0 - exact).abs().max() < 1e-4


@pytest.mark.parametrize("function", [target_of, x0_from_output])
def test_unknown_prediction_type_is_refused(function):
    latents, noise, alpha, sigma, _ = process("epsilon")
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        function(latents, noise, alpha, sigma, "score")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_schedule_agrees_with_diffusers(prediction_type):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    timesteps = torch.tensor([0, 1, 199, 500, 999])
    alpha, sigma = (table[timesteps].float() for table in alpha_sigma_table(scheduler))
    torch.testing.assert_close(add_noise(latents, noise, alpha, sigma), scheduler.add_noise(latents, noise, timesteps))
    velocity = target_of(latents, noise, alpha, sigma, "v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, timesteps))


def test_table_is_variance_preserving_in_double_precision():
    alpha, sigma = alpha_sigma_table(DDPMScheduler(rescale_betas_zero_snr=True))
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha.shape == sigma.shape == (1000,)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert alpha[-1] == 0
    assert sigma[-1] == 1


def test_flow_schedule_has_no_table():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod: pass sigmas"):
        alpha_sigma_table(FlowMatchEulerDiscreteScheduler())


def test_signal_to_noise():
    snr = signal_to_noise(torch.tensor([0.8, 0.6, 0.0, 1.0]), torch.tensor([0.2, 0.6, 1.0, 0.0]))
    assert snr.tolist() == pytest.approx([16.0, 1.0, 0.0, float("inf")])


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 2, 2, 2), (3, 1, 2, 3, 4)])
def test_coefficients_belong_to_samples_in_any_dimension(shape):
    latents, noise = torch.ones(shape), torch.zeros(shape)
    alpha = torch.tensor([1.0, 2.0, 3.0])
    noisy = add_noise(latents, noise, alpha, alpha)
    assert torch.equal(noisy.flatten(1).mean(1), alpha)
