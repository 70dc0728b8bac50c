"""lpl_warmup_steps: a linear ramp on the weight, of which "auto" knows nothing."""

import pytest
import torch
from diffusers import DDPMScheduler

from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.objective import PerceptualObjective


def term_at(objective, step, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise, output = (torch.randn(4, 4, 4, 4, generator=generator) for _ in range(3))
    output.requires_grad_()
    diffusion_loss = output.square().mean()
    t = torch.tensor([10, 50, 100, 900])
    noisy = DDPMScheduler().add_noise(latents, noise, t)
    return objective(output, noisy, latents, t, diffusion_loss=diffusion_loss, step=step)


def build(vae, **options):
    loss = LatentPerceptualLoss(vae, num_blocks=1, norm_type="channel")
    return PerceptualObjective(loss, DDPMScheduler(), **options)


def test_weight_rises_linearly_from_lpl_start(vae):
    """Three steps of 1/4, 2/4 and 3/4, then all of it."""
    plain = term_at(build(vae, lpl_weight=2.0), 0)
    ramped = build(vae, lpl_weight=2.0, lpl_start=5, lpl_warmup_steps=3)
    for step, share in [(5, 0.25), (6, 0.5), (7, 0.75), (8, 1.0), (9, 1.0), (1000, 1.0)]:
        term = term_at(ramped, step)
        assert term.loss.item() == pytest.approx(share * plain.loss.item(), rel=1e-6)
        assert term.metrics["lpl/weight"] == pytest.approx(2 * share)
        assert float(term.metrics["lpl/weighted_loss"]) == pytest.approx(term.loss.item())
        square = plain.metrics["lpl/gradient_square"]
        assert float(term.metrics["lpl/gradient_square"]) == pytest.approx(share**2 * float(square), rel=1e-5)


def test_auto_measures_as_without_the_ramp(vae):
    plain, ramped = build(vae, lpl_weight="auto"), build(vae, lpl_weight="auto", lpl_warmup_steps=3)
    for step in range(4):
        a, b = term_at(plain, step, seed=step), term_at(ramped, step, seed=step)
        assert b.loss.item() == pytest.approx(a.loss.item() * (step + 1) / 4, rel=1e-6)
        plain.end_step()
        ramped.end_step()
        assert plain.auto.state_dict() == ramped.auto.state_dict()
    assert float(plain.auto.weight) > 0


def test_start_alone_acts_as_well(vae):
    """Without a ramp the weight is 0 before lpl_start and whole from it on."""
    plain = term_at(build(vae, lpl_weight=2.0), 0)
    late = build(vae, lpl_weight=2.0, lpl_start=5)
    assert [term_at(late, step).loss.item() for step in (4, 5)] == [0, plain.loss.item()]
    assert [term_at(late, step).num_samples for step in (4, 5)] == [0, plain.num_samples]  # nothing is decoded for 0
    with pytest.raises(ValueError, match="lpl_start needs step"):
        term_at(late, None)


def test_ramp_needs_the_step(vae):
    with pytest.raises(ValueError, match="lpl_warmup_steps needs step"):
        term_at(build(vae, lpl_warmup_steps=3), None)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        build(vae, lpl_warmup_steps=-1)
