"""LPL under a mask, against plain autograd of the formula, on every way through the decoder."""

import pytest
import torch
from diffusers import DDPMScheduler

from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.perceptual import strips
from lpl.perceptual.distance import NORM_TYPES
from lpl.perceptual.textbook import textbook_lpl


def make_mask(batch=3, size=(8, 8)):
    """Soft, with a quarter left out; the last sample's is empty."""
    mask = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(3))
    mask[:, :, : size[0] // 2, : size[1] // 2] = 0
    mask[-1] = 0
    return mask


def value_and_gradient(per_sample, pred):
    weights = torch.linspace(0.5, 2, len(per_sample), dtype=per_sample.dtype)
    return per_sample.detach(), torch.autograd.grad((weights * per_sample).sum(), pred)[0]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()


@pytest.mark.parametrize("loss_type", ["mse", "l1"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_value_and_gradient_are_autograds(vae, random_latents, norm_type, loss_type):
    """Outliers are removed: both masks are at work."""
    pred, target = random_latents(vae, batch=3)
    options, mask = {"norm_type": norm_type, "loss_type": loss_type}, make_mask()
    expected = value_and_gradient(textbook_lpl(vae, pred, target, **options, inside=mask), pred)
    out = LatentPerceptualLoss(vae, **options)(pred, target, mask)
    assert max(fraction.max() for fraction in out.outlier_fraction.values()) > 0
    close(value_and_gradient(out.per_sample, pred), expected, 1e-4)
    assert out.per_sample[2] == 0
    assert (out.gradient[2] == 0).all()
    unmasked = LatentPerceptualLoss(vae, **options)(pred, target)
    difference = (out.gradient - unmasked.gradient).flatten(1).norm(dim=1)
    assert (difference > 0.1 * unmasked.gradient.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"channels_last": False}, {"chunk": 1}, {"chunk": 2}])
@pytest.mark.parametrize("strip_bytes", [1, 2**23])
def test_every_way_through_the_decoder(monkeypatch, vae, random_latents, options, strip_bytes):
    pred, target = random_latents(vae, batch=3)
    expected = value_and_gradient(textbook_lpl(vae, pred, target, inside=make_mask()), pred)
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": strip_bytes})
    out = LatentPerceptualLoss(vae, **options)(pred, target, make_mask())
    close(value_and_gradient(out.per_sample, pred), expected)


def test_sizes_that_are_not_square(vae, random_latents):
    pred, target = random_latents(vae, batch=2, size=(6, 10))
    mask = make_mask(2, (6, 10))
    out = LatentPerceptualLoss(vae)(pred, target, mask)
    expected = value_and_gradient(textbook_lpl(vae, pred, target, inside=mask), pred)
    close(value_and_gradient(out.per_sample, pred), expected)


def test_random_depth_is_the_full_loss_on_average(vae, random_latents):
    pred, target = random_latents(vae, batch=3)
    mask = make_mask()
    full = LatentPerceptualLoss(vae)(pred, target, mask)
    loss_fn = LatentPerceptualLoss(vae, random_depth=True)
    reach = [*loss_fn.reach, 0.0]
    outs = [loss_fn(pred, target, mask, depth=depth) for depth in range(1, 6)]
    chances = [reach[i] - reach[i + 1] for i in range(5)]
    mean = sum(p * out.per_sample for p, out in zip(chances, outs, strict=True))
    gradient = sum(p * out.gradient for p, out in zip(chances, outs, strict=True))
    torch.testing.assert_close(mean, full.per_sample, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, full.gradient, rtol=1e-4, atol=1e-7)


def test_the_mask_is_cut_with_the_window(vae, random_latents):
    """Marked in the upper left alone: a window there sees it all, one in the lower right nothing but the first tap."""
    pred, target = random_latents(vae)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4, :4] = 1
    loss_fn = LatentPerceptualLoss(vae, crop=32, norm_type="default")
    out = loss_fn(pred, target, mask, windows=torch.tensor([[0.0, 0.0], [0.999, 0.999]]))
    whole = loss_fn(pred, target, windows=torch.tensor([[0.0, 0.0], [0.999, 0.999]]))
    for tap in ("up_0", "up_1", "up_2", "up_3"):
        torch.testing.assert_close(out.per_layer[tap][0], whole.per_layer[tap][0])
        assert out.per_layer[tap][1] == 0
    assert (out.per_layer["mid"] > 0).all()
    assert not torch.allclose(out.per_layer["mid"], whole.per_layer["mid"])
    assert out.gradient.isfinite().all()


def test_objective_weighs_and_masks_the_gated_samples(vae, random_latents):
    """Against the formula: sum of sample weight * masked loss over the gated, by expectation."""
    scheduler = DDPMScheduler(prediction_type="sample")
    pred, target = random_latents(vae, batch=4)
    mask, timesteps = make_mask(4).flip(0), torch.tensor([10, 900, 20, 30])
    weights = torch.tensor([1.0, 1.0, 0.5, 2.0])
    objective = PerceptualObjective(LatentPerceptualLoss(vae), scheduler, 0.7, lpl_t_threshold=200, lpl_scale=False)
    noisy = scheduler.add_noise(
        target, torch.randn(target.shape, generator=torch.Generator().manual_seed(1)), timesteps
    )
    term = objective(pred, noisy, target, timesteps, sample_weight=weights, mask=mask)
    per_sample = textbook_lpl(vae, pred, target, inside=mask)
    gated = torch.tensor([True, False, True, True])
    expected = 0.7 * (weights * gated * per_sample).sum() / (4 * 0.2)
    assert per_sample[0] == 0
    assert term.num_samples == 3
    torch.testing.assert_close(term.loss, expected.detach())
    ours, theirs = (torch.autograd.grad(value, pred)[0] for value in (term.loss, expected))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
