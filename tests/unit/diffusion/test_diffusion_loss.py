import pytest
import torch

from lpl.diffusion.losses import diffusion_loss, min_snr_weight
from lpl.diffusion.prediction import PREDICTION_TYPES, output_sensitivity, target_of


def test_mean_squared_error_per_sample():
    output, target = torch.tensor([[[1.0, 2.0]], [[0.0, 4.0]]]), torch.tensor([[[1.0, 4.0]], [[3.0, 0.0]]])
    assert diffusion_loss(output, target).tolist() == [2.0, 12.5]
    assert diffusion_loss(output, target, torch.tensor([0.5, 2.0])).tolist() == [1.0, 25.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """Squares of 300 overflow float16."""
    output = torch.full((2, 4, 8, 8), 300.0, dtype=dtype, requires_grad=True)
    loss = diffusion_loss(output, torch.zeros(2, 4, 8, 8, dtype=dtype), torch.ones(2, dtype=torch.float64))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [90000.0, 90000.0]
    loss.mean().backward()
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perfect_output_has_loss_zero(prediction_type):
    """For `sample` that is the clean latent itself: fails where the noise is subtracted from it."""
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.tensor([0.8, 0.6, 0.1]), torch.tensor([0.6, 0.8, 0.9])
    meant = {
        "epsilon": noise,
        "v_prediction": alpha.view(3, 1, 1, 1) * noise - sigma.view(3, 1, 1, 1) * latents,
        "sample": latents,
        "flow": noise - latents,
        "flow_to_data": latents - noise,
    }[prediction_type]
    target = target_of(latents, noise, alpha, sigma, prediction_type)
    assert (diffusion_loss(meant, target) == 0).all()
    assert (diffusion_loss(meant - noise, target) > 0).all()


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [1.0, 1.0, 0.5]),
        ("v_prediction", [1 / 2, 5 / 6, 5 / 11]),
        ("sample", [1.0, 5.0, 5.0]),
        ("flow", [0.25, 1.25, 1.25]),
        ("flow_to_data", [0.25, 1.25, 1.25]),
    ],
)
def test_min_snr_by_hand(prediction_type, expected):
    """gamma 5 at SNR 1, 5 and 10; sigma 0.5."""
    weight = min_snr_weight(torch.tensor([1.0, 5.0, 10.0]), 5.0, prediction_type, torch.full((3,), 0.5))
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_is_one_weight_on_the_x0_error(prediction_type):
    """weight = m * |dx0/do|^2, so that weight * |do|^2 = m * |dx0|^2: the loss that every parameterisation shares."""
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    alpha = 1 - sigma if prediction_type.startswith("flow") else (1 - sigma**2).sqrt()
    snr = (alpha / sigma).square()
    expected = snr.clamp(max=5) * output_sensitivity(alpha, sigma, prediction_type).square()
    torch.testing.assert_close(min_snr_weight(snr, 5.0, prediction_type, sigma), expected)


def test_min_snr_at_zero_and_infinite_snr():
    snr = torch.tensor([0.0, float("inf")])
    assert min_snr_weight(snr, 5.0, "epsilon").tolist() == [1.0, 0.0]
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == [0.0, 0.0]
    assert min_snr_weight(snr, 5.0, "sample").tolist() == [0.0, 5.0]


@pytest.mark.parametrize("prediction_type", ["flow", "flow_to_data"])
def test_min_snr_of_a_flow_needs_sigma(prediction_type):
    with pytest.raises(ValueError, match="needs sigma"):
        min_snr_weight(torch.ones(2), 5.0, prediction_type)


def masked_batch():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 4, 6, 5, generator=generator)
    return output.requires_grad_(), target, torch.rand(3, 1, 6, 5, generator=generator)


@pytest.mark.parametrize("huber_c", [None, torch.tensor([0.1, 0.5, 2.0])])
def test_mask_weighs_the_mean(huber_c):
    """sum(m f) / (C sum(m)), times the weight of the sample; against autograd of that formula."""
    output, target, mask = masked_batch()
    weight = torch.tensor([1.0, 0.5, 3.0])
    loss = diffusion_loss(output, target, weight, huber_c, mask)
    square = (output - target).square()
    if huber_c is not None:
        c = huber_c.view(3, 1, 1, 1)
        square = 2 * c * ((square + c**2).sqrt() - c)
    expected = weight * (mask * square).sum((1, 2, 3)) / (4 * mask.sum((1, 2, 3)))
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), output, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_mask_of_any_constant_is_no_mask():
    output, target, mask = masked_batch()
    for value in (1.0, 0.3):
        masked = diffusion_loss(output, target, mask=torch.full_like(mask, value))
        torch.testing.assert_close(masked, diffusion_loss(output, target))


def test_what_is_masked_out_has_no_influence():
    output, target, mask = masked_batch()
    mask[:, :, :, :2] = 0
    other = target.clone()
    other[..., :2] = 100.0
    loss = diffusion_loss(output, target, mask=mask)
    assert torch.equal(loss, diffusion_loss(output, other, mask=mask))
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert (gradient[..., :2] == 0).all()
    assert (gradient[..., 2:] != 0).all()


def test_empty_mask_is_an_exact_zero():
    output, target, mask = masked_batch()
    mask[1] = 0
    loss = diffusion_loss(output, target, mask=mask)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert loss[1] == 0
    assert (gradient[1] == 0).all()
    assert (gradient[[0, 2]] != 0).all()


def test_what_is_not_finite_is_seen_under_the_mask():
    output, target, mask = masked_batch()
    mask[:, :, 0, 0] = 0
    with torch.no_grad():
        output[0, 0, 0, 0] = float("inf")
    assert diffusion_loss(output, target, mask=mask).isfinite().tolist() == [False, True, True]
