import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.perceptual.random_depth import REACH, depth_of, reach_probabilities


@pytest.mark.parametrize("random_depth", [True, (1.0, 0.7, 0.7, 0.2, 0.05)])
def test_mean_over_depths_is_the_full_loss_and_gradient(vae, random_latents, random_depth):
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae, random_depth=random_depth)
    full = loss_fn(pred, target)
    probability = [a - b for a, b in itertools.pairwise((*loss_fn.reach, 0.0))]
    parts = [(p, loss_fn(pred, target, depth=i + 1)) for i, p in enumerate(probability) if p > 0]
    torch.testing.assert_close(sum(p * part.per_sample for p, part in parts), full.per_sample)
    torch.testing.assert_close(sum(p * part.gradient for p, part in parts), full.gradient, rtol=1e-4, atol=1e-9)
    for depth in range(1, 6):
        out = loss_fn(pred, target, depth=depth)
        assert list(out.per_layer) == [tap.name for tap in loss_fn.taps[:depth]]
        for name, value in out.per_layer.items():
            torch.testing.assert_close(value, full.per_layer[name])


def test_decoder_stops_at_the_depth(vae, random_latents, weights_used):
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae, random_depth=True)
    used = weights_used(lambda: loss_fn(pred, target, depth=2))
    reached = [b.resnets[0].conv1.weight.data_ptr() in used for b in (vae.decoder.mid_block, *vae.decoder.up_blocks)]
    assert reached == [True, True, False, False, False]


def test_depths_follow_their_probabilities():
    reach = (1.0, 0.8, 0.5, 0.5, 0.1)
    draws = (torch.arange(10_000) + 0.5) / 10_000
    depths = torch.tensor([depth_of(float(u), reach) for u in draws])
    assert [((depths > i).double().mean() - p).abs() < 1e-3 for i, p in enumerate(reach)] == [True] * 5
    assert depths.min() == 1


def test_shipped_probabilities():
    assert reach_probabilities(5, True) == REACH
    assert reach_probabilities(3, True) == REACH[:3]
    assert reach_probabilities(7, True) == (*REACH, REACH[-1], REACH[-1])
    assert reach_probabilities(5, False) is None


@pytest.mark.parametrize("given", [(1.0, 0.5), (0.9, 0.5, 0.4), (1.0, 0.5, 0.6), (1.0, 0.5, 0.0)])
def test_probabilities_that_make_no_sense_are_refused(given):
    with pytest.raises(ValueError, match="random_depth needs 3 probabilities"):
        reach_probabilities(3, given)


def test_depth_without_the_option_is_refused(vae, random_latents):
    with pytest.raises(ValueError, match="depth 2 needs random_depth"):
        LatentPerceptualLoss(vae)(*random_latents(vae), depth=2)
    with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
        LatentPerceptualLoss(vae, random_depth=True)(*random_latents(vae), depth=6)


class Recorder:
    """A loss that only notes the depths it is asked for."""

    reach, crop = REACH, None

    def __init__(self, latent_distance):
        self.depths, self.latent_distance = [], latent_distance

    def __call__(self, *args, depth, windows):
        self.depths.append(depth)
        return self.latent_distance(*args)


def call(objective, step):
    generator = torch.Generator().manual_seed(0)
    output, noise, latents = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(3))
    output.requires_grad_()
    loss, timesteps = (output - latents).square().mean(), torch.tensor([10, 20])
    noisy = DDPMScheduler().add_noise(latents, noise, timesteps)
    return objective(output, noisy, latents, timesteps, diffusion_loss=loss, step=step)


def test_objective_draws_the_depth_from_seed_and_step(latent_distance, sdxl_scheduler):
    """The same on every process and at every micro-batch of a step; another for another step or seed."""
    depths = []
    for seed in (0, 0, 1):
        loss_fn = Recorder(latent_distance)
        objective = PerceptualObjective(loss_fn, sdxl_scheduler, seed=seed)
        for step in range(200):
            call(objective, step)
        depths.append(loss_fn.depths)
    assert depths[0] == depths[1] != depths[2]
    counts = [sum(d > i for d in depths[0]) / 200 for i in range(5)]
    assert counts == pytest.approx(REACH, abs=0.12)
    with pytest.raises(ValueError, match="pass step="):
        call(objective, None)


def test_auto_weight_measures_at_full_depth(latent_distance, sdxl_scheduler):
    loss_fn = Recorder(latent_distance)
    objective = PerceptualObjective(loss_fn, sdxl_scheduler, "auto")
    for step in range(130):
        call(objective, step)
        objective.end_step()
    assert objective.auto.fixed
    assert set(loss_fn.depths[:128]) == {None}
    assert None not in loss_fn.depths[128:]
