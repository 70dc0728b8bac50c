import json
import logging

import pytest
import torch

from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.diffusion.prediction import add_noise, alpha_sigma_table
from lpl.perceptual.auto_weight import MEASURED_SAMPLES, AutoWeight
from lpl.perceptual.input_checks import diffusion_gradient
from lpl.perceptual.term import gradient_share


def squares(lpl, diffusion):
    return torch.tensor(lpl), torch.tensor(diffusion)


def test_weight_by_hand():
    """r_diffusion / r_lpl = sqrt(36 / 4) = 3; a share of 0.25 is odds of 1/3."""
    auto = AutoWeight(0.25)
    auto.measure(*squares(1.0, 16.0), 10)
    auto.measure(*squares(3.0, 20.0), 10)
    assert auto.weight == 0
    auto.end_step()
    assert float(auto.weight) == pytest.approx(1.0)
    assert gradient_share(4.0 * float(auto.weight) ** 2, 36.0) == pytest.approx(0.25)


def test_weight_of_a_step_is_from_the_steps_before_it():
    auto = AutoWeight(0.5)
    auto.end_step()
    assert auto.weight == 0
    auto.measure(*squares(1.0, 4.0), 1)
    assert auto.weight == 0
    auto.end_step()
    assert float(auto.weight) == 2
    auto.measure(*squares(1.0, 14.0), 1)
    assert float(auto.weight) == 2
    auto.end_step()
    assert float(auto.weight) == 3


def test_fixed_after_256_gated_samples():
    auto = AutoWeight(0.5)
    for step, gated in enumerate((100, 155, 1)):
        assert not auto.fixed
        auto.measure(*squares(1.0, 1.0 + step), gated)
        auto.end_step()
    assert auto.measured == MEASURED_SAMPLES == 256
    assert auto.fixed
    assert isinstance(auto.weight, float)
    weight = auto.weight
    auto.measure(*squares(1.0, 1e6), 100)
    auto.end_step()
    assert auto.weight == weight == pytest.approx(2**0.5)


def test_steps_without_a_gated_sample_count_for_the_diffusion_loss():
    auto = AutoWeight(0.5)
    auto.measure(*squares(0.0, 9.0), 0)
    auto.end_step()
    assert float(auto.weight) == 0
    auto.measure(*squares(1.0, 7.0), 3)
    auto.end_step()
    assert float(auto.weight) == 4
    assert auto.measured == 3


def test_no_lpl_gradient_gives_weight_zero():
    auto = AutoWeight(0.5)
    auto.measure(*squares(0.0, 9.0), 256)
    auto.end_step()
    assert auto.weight == 0


def test_reduce_sums_over_processes():
    """Two processes that measured the same: the weight is that of one, the samples are twice as many."""
    alone, pair = AutoWeight(0.3), AutoWeight(0.3)
    for auto in (alone, pair):
        auto.measure(*squares(1.0, 5.0), 128)
    alone.end_step()
    pair.end_step(reduce=lambda x: 2 * x)
    assert float(pair.weight) == float(alone.weight)
    assert (alone.measured, pair.measured) == (128, 256)
    assert (alone.fixed, pair.fixed) == (False, True)


def test_reduce_takes_part_on_every_process():
    """A process without a gated sample still takes the others' measurement."""
    auto = AutoWeight(0.5)
    auto.measure(*squares(0.0, 1.0), 0)
    auto.end_step(reduce=lambda x: x + torch.tensor([1.0, 3.0, 5.0], dtype=x.dtype))
    assert float(auto.weight) == 2
    assert auto.measured == 5


@pytest.mark.parametrize("done", [0, 1, 2, 4])
def test_state_survives_a_checkpoint(done):
    """Through JSON, before the first step, in the middle and after it is fixed."""
    measured = [(1.0, 3.0, 60), (0.0, 2.0, 0), (2.0, 7.0, 100), (0.5, 1.0, 96), (5.0, 1.0, 60)]
    straight, resumed = AutoWeight(0.2), AutoWeight(0.2)
    for step, (lpl, diffusion, gated) in enumerate(measured):
        if step == done:
            resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
            assert float(resumed.weight) == float(straight.weight)
        for auto in (straight, resumed):
            auto.measure(*squares(lpl, diffusion), gated)
            auto.end_step()
    assert straight.fixed
    assert resumed.state_dict() == straight.state_dict()


def test_forgotten_end_step_is_said():
    auto = AutoWeight(0.2)
    auto.measure(*squares(1.0, 1.0), 64 * 256)
    with pytest.raises(RuntimeError, match=r"objective\.end_step"):
        auto.measure(*squares(1.0, 1.0), 1)


# With the objective.


def make_batch(scheduler, size, seed):
    """Model output, noisy latents, latents, timesteps, and the noise; about half of the samples pass."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise, error = torch.randn(3, size, 4, 4, 4, generator=generator)
    timesteps = torch.randint(400, 1000, (size,), generator=generator)
    noisy = add_noise(latents, noise, *(table[timesteps].float() for table in alpha_sigma_table(scheduler)))
    return (noise + 0.2 * error).requires_grad_(), noisy, latents, timesteps, noise


def run_step(objective, batch, sizes):
    """One optimizer step of len(sizes) micro-batches."""
    for rows in torch.arange(sum(sizes)).split(sizes):
        output, noisy, latents, timesteps, noise = (x[rows] for x in batch)
        diffusion_loss = (output - noise).square().mean()
        objective(output, noisy, latents, timesteps, diffusion_loss=diffusion_loss)
    objective.end_step()


def measured_share(objective, batches):
    """r_lpl / (r_lpl + r_diffusion) by plain autograd, over all samples of the batches."""
    sums = torch.zeros(2, dtype=torch.float64)
    for output, noisy, latents, timesteps, noise in batches:
        diffusion_loss = (output - noise).square().mean()
        term = objective(output, noisy, latents, timesteps, diffusion_loss=diffusion_loss)
        for i, loss in enumerate((term.loss, diffusion_loss)):
            sums[i] += torch.autograd.grad(loss, output, retain_graph=True)[0].double().square().sum()
    lpl, diffusion = sums.sqrt()
    return (lpl / (lpl + diffusion)).item()


@pytest.mark.parametrize("options", [{}, {"lpl_reduction": "gated"}, {"lpl_max_samples": 10, "lpl_scale": False}])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_target_share_is_reached(sdxl_scheduler, get_vae, share, options):
    """Plain autograd over the samples that were measured finds the share that was asked for."""
    loss_fn = LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1)
    objective = PerceptualObjective(loss_fn, sdxl_scheduler, "auto", lpl_target_share=share, **options)
    batches = [make_batch(sdxl_scheduler, 160, seed) for seed in range(4)]
    for batch in batches:
        assert not objective.auto.fixed
        run_step(objective, batch, [160])
    assert objective.auto.fixed
    assert measured_share(objective, batches) == pytest.approx(share, rel=1e-4)
    assert objective.weight == objective.auto.weight


def test_share_holds_on_samples_that_were_not_measured(sdxl_scheduler, get_vae):
    loss_fn = LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1)
    objective = PerceptualObjective(loss_fn, sdxl_scheduler, "auto")
    for seed in range(5):
        run_step(objective, make_batch(sdxl_scheduler, 128, seed), [128])
    assert objective.auto.fixed
    assert measured_share(objective, [make_batch(sdxl_scheduler, 256, 100)]) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("sizes", [[8, 8], [4] * 4, [1] * 16])
def test_weight_does_not_know_of_micro_batches(sdxl_scheduler, latent_distance, sizes):
    """One batch of 16 or its parts, accumulated: the same weight after every step and the same number measured."""
    whole, parts = (PerceptualObjective(latent_distance, sdxl_scheduler, "auto") for _ in range(2))
    for seed in range(40):
        batch = make_batch(sdxl_scheduler, 16, seed)
        run_step(whole, batch, [16])
        run_step(parts, batch, sizes)
        assert float(parts.weight) == pytest.approx(float(whole.weight), rel=1e-5)
        assert parts.auto.measured == whole.auto.measured
    assert whole.auto.fixed
    assert parts.auto.fixed


def test_first_step_has_weight_zero_and_no_effect(sdxl_scheduler, latent_distance):
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, "auto")
    output, noisy, latents, timesteps, noise = make_batch(sdxl_scheduler, 16, 0)
    diffusion_loss = (output - noise).square().mean()
    term = objective(output, noisy, latents, timesteps, diffusion_loss=diffusion_loss)
    assert term.loss == 0
    assert (torch.autograd.grad(term.loss, output)[0] == 0).all()
    assert term.metrics["lpl/gradient_square"] == 0
    objective.end_step()
    assert objective.weight > 0


def test_auto_without_the_diffusion_loss_is_refused(sdxl_scheduler, latent_distance):
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, "auto")
    with pytest.raises(ValueError, match="pass diffusion_loss="):
        objective(*make_batch(sdxl_scheduler, 2, 0)[:4])


def test_a_number_is_taken_as_it_is(sdxl_scheduler, latent_distance):
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, 1.5)
    run_step(objective, make_batch(sdxl_scheduler, 16, 0), [16])
    assert objective.weight == 1.5
    assert objective.auto is None


def test_end_step_that_is_missing_is_said_once_enough_is_measured(sdxl_scheduler, latent_distance, caplog):
    """A warning where the steps are not known, an error where they are; one step of many samples is neither."""
    batch = make_batch(sdxl_scheduler, 600, 0)
    output, noisy, latents, timesteps, noise = batch

    def measure(objective, **options):
        objective(output, noisy, latents, timesteps, diffusion_loss=(output - noise).square().mean(), **options)

    objective = PerceptualObjective(latent_distance, sdxl_scheduler, "auto")
    with caplog.at_level(logging.WARNING):
        measure(objective)
        assert not caplog.records
        measure(objective)
        measure(objective)
        assert len(caplog.records) == 1
    assert "needs objective.end_step()" in caplog.text
    caplog.clear()
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, "auto")
    for _ in range(3):
        measure(objective, step=7)
    assert not caplog.records
    with pytest.raises(RuntimeError, match=r"needs objective\.end_step\(\) .* measured \d+ gated samples"):
        measure(objective, step=8)


def test_a_weight_of_0_is_never_fixed(caplog):
    """Every sample weight was 0, say: it is said, and measured anew."""
    auto = AutoWeight(0.5)
    with caplog.at_level(logging.WARNING):
        auto.measure(*squares(0.0, 9.0), 256)
        auto.end_step()
    assert "found a weight of 0: the gradient of LPL (0) or of the diffusion loss (3)" in caplog.text
    assert (auto.fixed, auto.measured) == (False, 0)
    auto.measure(*squares(1.0, 4.0), 256)
    auto.end_step()
    assert (auto.fixed, auto.weight) == (True, 2)


def test_gradients_at_float16_outputs_are_measured_where_float16_has_no_numbers():
    """Those of a mean over 65,536 values, 3e-8 each: float16's smallest number is 6e-8."""
    output = torch.where(torch.arange(2**16) % 2 == 0, 1e-3, -8e-4).view(1, 4, 128, 128).half().requires_grad_()
    found = diffusion_gradient(output.float().square().mean(), output)
    torch.testing.assert_close(found, 2 * output.detach().float() / 2**16, rtol=2e-3, atol=0)
