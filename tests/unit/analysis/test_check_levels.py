"""Gradients and distances by noise level: against autograd on a constructed case, and against the objective's own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_models import tiny_vae
from torch import nn

from lpl.analysis.check import levels
from lpl.analysis.check.images import Encoded, Picture
from lpl.analysis.check.suggest import weight_for
from lpl.config import DiffusionConfig, TrainConfig
from lpl.data.crops import plan_crop
from lpl.diffusion.latent_space import LatentSpace
from lpl.diffusion.schedule import schedule_of
from lpl.perceptual.gate import Gate
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.objective import PerceptualObjective
from lpl.training.step import TrainingStep

TIMESTEPS = 40


def test_squares_and_cosine_of_known_gradients() -> None:
    """Terms linear in the output have their coefficients as gradients."""
    a = torch.tensor([[[[3.0, 4.0]]], [[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    b = torch.tensor([[[[4.0, 3.0]]], [[[-2.0, 0.0]]], [[[1.0, 1.0]]]])
    output = torch.randn(a.shape).requires_grad_()
    found = levels.gradients_of(output, (a * output).sum((1, 2, 3)), (b * output).sum((1, 2, 3)))
    assert found.lpl_square.tolist() == [25, 1, 0]
    assert found.diffusion_square.tolist() == [25, 4, 2]
    assert found.cosine.tolist() == pytest.approx([0.96, -1, 0])


def make(snr_gamma: float | None = None, prediction_type: str = "epsilon", **lpl: Any) -> tuple[TrainingStep, Encoded]:
    """Three pictures with random latents and a denoiser that halves what it is given."""
    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS, prediction_type=prediction_type)
    vae = tiny_vae(widths=(8, 8))
    loss = LatentPerceptualLoss(vae, num_blocks=1, norm_type="channel")
    objective = PerceptualObjective(loss, scheduler, 1.0, TIMESTEPS, snr_gamma=snr_gamma, **lpl)
    family = SimpleNamespace(
        latent_space=LatentSpace.from_config(vae.config),
        schedule=schedule_of(scheduler),
        denoise=lambda denoiser, noisy, *rest: 0.5 * noisy + rest[0].view(-1, 1, 1, 1),
    )
    step: Any = TrainingStep(family, DiffusionConfig(snr_gamma=snr_gamma), objective, seed=3)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(1)
    crop = plan_crop(8, 8, (8, 8), True)
    pictures = [Picture(f"p{n}", f"p{n}", "", crop, torch.zeros(3, 8, 8, dtype=torch.uint8), None) for n in range(3)]
    mean = [torch.randn(1, 4, 4, 4, generator=random) for _ in pictures]
    encoded = Encoded(pictures, mean, [0.1 + 0 * m for m in mean], [{"e": torch.zeros(1, 1)}] * 3, 3, 0.0)
    return step, encoded


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("snr_gamma", [None, 2.0])
def test_each_gradient_is_the_one_that_the_objective_measures(prediction_type: str, snr_gamma: float | None) -> None:
    step, encoded = make(snr_gamma, prediction_type)
    found = levels.measure(step, nn.Identity(), encoded, torch.device("cpu"))
    assert found.levels.shape == (3, 10)
    assert all(
        low <= t < high for row in found.levels.tolist() for t, low, high in zip(row, *edges(found), strict=True)
    )
    for n, k in ((0, 0), (1, 4), (2, 9)):
        timesteps = found.levels[n : n + 1, k]
        batch = encoded.batch([n], k)
        seen = levels.estimate(step, nn.Identity(), batch, timesteps, torch.device("cpu"))
        target = {"epsilon": seen.noise, "sample": seen.latents}.get(prediction_type)
        if target is None:
            target = seen.alpha.item() * seen.noise - seen.sigma.item() * seen.latents
        torch.testing.assert_close(seen.target, target)
        diffusion = step.diffusion_per_sample(seen).mean()
        term = step.objective(seen.model_output, seen.noisy_latents, seen.latents, timesteps, diffusion_loss=diffusion)
        ours = (found.lpl_square[n, k].item(), found.diffusion_square[n, k].item())
        theirs = (float(term.metrics["lpl/gradient_square"]), float(term.metrics["diffusion/gradient_square"]))
        assert ours == pytest.approx(theirs, rel=1e-4)
        (sum_gradient,) = torch.autograd.grad(term.loss + diffusion, seen.model_output)
        cosine = (float(sum_gradient.square().sum()) - sum(ours)) / (2 * (ours[0] * ours[1]) ** 0.5)
        assert found.cosine[n, k].item() == pytest.approx(cosine, abs=1e-3)
        assert found.lpl[n, k].item() == pytest.approx(float(term.metrics["lpl/loss"]), rel=1e-5)
        assert found.distance[1, n, k].item() == pytest.approx(
            float(term.metrics["lpl/features/layer_1/distance"]), rel=1e-5
        )


def edges(found: levels.Levels) -> tuple[list[int], list[int]]:
    return found.edges[:-1], found.edges[1:]


def test_weight_is_that_of_auto_on_the_same_samples() -> None:
    """AutoWeight's closed formula over the very draws, each part of the schedule being equally likely."""
    step, encoded = make()
    found = levels.measure(step, nn.Identity(), encoded, torch.device("cpu"))
    loss, scheduler = step.objective.loss_fn, step.family.schedule
    auto = PerceptualObjective(loss, scheduler, "auto", 17, lpl_target_share=0.3)
    for n in range(3):
        for k in range(10):
            timesteps = found.levels[n : n + 1, k]
            seen = levels.estimate(step, nn.Identity(), encoded.batch([n], k), timesteps, torch.device("cpu"))
            diffusion = step.diffusion_per_sample(seen).mean()
            auto(seen.model_output, seen.noisy_latents, seen.latents, timesteps, diffusion_loss=diffusion)
    auto.end_step()
    weight = weight_for(found, Gate(step.schedule, 17), TrainConfig(), 0.3, seed=0)
    assert weight.value == pytest.approx(float(auto.weight), rel=1e-4)
    assert weight.interval is None  # of three pictures


def test_rows_are_means_over_pictures_and_nothing_is_lost_to_undefined_ones() -> None:
    step, encoded = make()
    found = levels.measure(step, nn.Identity(), encoded, torch.device("cpu"))
    found = dataclasses.replace(
        found,
        cosine=torch.tensor([[0.2], [0.6], [torch.nan]]).repeat(1, 10).double(),
        lpl_square=torch.tensor([[9.0], [9.0], [torch.nan]]).repeat(1, 10).double(),
        diffusion_square=torch.tensor([[4.0], [4.0], [torch.nan]]).repeat(1, 10).double(),
    )
    row = levels.gradient_rows(found)[3]
    assert (row["t_low"], row["t_high"], row["num"]) == (12, 16, 2)
    assert (row["ratio"], row["cosine"]) == pytest.approx((1.5, 0.4))
    assert row["cosine_error"] == pytest.approx(0.2)
    layers = levels.layer_rows(found, step.objective.loss_fn)
    assert [(layer["tap"], layer["stride"], len(layer["bins"])) for layer in layers] == [
        ("mid", 2, 10),
        ("up_0", 1, 10),
    ]
    assert layers[1]["bins"][2]["distance"] == pytest.approx(float(found.distance[1, :, 2].mean()))


def test_pure_noise_says_nothing_of_the_clean_image() -> None:
    step, encoded = make()
    step.schedule.alpha[-4:] = 0
    found = levels.measure(step, nn.Identity(), encoded, torch.device("cpu"))
    assert found.lpl[:, :9].isfinite().all()
    assert found.lpl[:, 9].isnan().all()
    assert levels.gradient_rows(found)[9]["num"] == 0
