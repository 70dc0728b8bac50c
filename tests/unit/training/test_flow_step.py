"""A training step by flow matching, with a denoiser by hand; options that do not act with a schedule or a family."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from tiny_models import tiny_vae

from lpl.base.errors import UserError
from lpl.config import DiffusionConfig, ModelConfig, TrainConfig, check_model_options
from lpl.data.dataset import Batch
from lpl.diffusion.draws import keyed_uniform
from lpl.diffusion.latent_space import LatentSpace
from lpl.diffusion.losses import flow_weight
from lpl.diffusion.schedule import Flow
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.objective import PerceptualObjective
from lpl.training.step import TrainingStep, run_schedule

IDS, COUNTS = ["a", "b", "c"], [0, 4, 2]


def make(config: DiffusionConfig) -> tuple[TrainingStep, Batch, list[torch.Tensor]]:
    vae, seen = tiny_vae(widths=(8, 8)), []

    def denoise(denoiser: Any, noisy: torch.Tensor, levels: torch.Tensor, text: Any, extra: Any) -> torch.Tensor:
        seen.append(levels)
        return denoiser * noisy + extra["sizes"].mean() * 0

    family: Any = SimpleNamespace(latent_space=LatentSpace.from_config(vae.config), schedule=Flow(), denoise=denoise)
    loss = LatentPerceptualLoss(vae, num_blocks=1, norm_type="channel")
    objective = PerceptualObjective(loss, run_schedule(Flow(), config), 1.0)
    raw = torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    return (
        TrainingStep(family, config, objective, seed=5),
        Batch(IDS, COUNTS, raw, {}, {"sizes": torch.ones(3, 6)}),
        seen,
    )


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap", "min_snr"])
def test_step_by_hand(weighting: str) -> None:
    """sigma = 3 u / (1 + 2 u) of keyed uniform u; the target is noise - latents; LPL has the very sigma."""
    options = {"snr_gamma": 5.0} if weighting == "min_snr" else {"loss_weighting": weighting}
    step, batch, seen = make(DiffusionConfig(timestep_shift=3.0, **options))  # type: ignore[arg-type]
    u = torch.tensor([keyed_uniform(5, "timestep", *key) for key in zip(IDS, COUNTS, strict=True)], dtype=torch.float64)
    sigma = 3 * u / (1 + 2 * u)
    scale = torch.tensor(0.3, requires_grad=True)
    out = step(scale, batch, torch.device("cpu"), True, 0)  # type: ignore[arg-type]
    torch.testing.assert_close(seen[0], sigma.float())
    noise, latents = step.draw(batch).noise, step.latent_space.from_raw(batch.raw_latents)
    s = sigma.float().view(-1, 1, 1, 1)
    noisy = (1 - s) * latents + s * noise
    plain = (0.3 * noisy - (noise - latents)).square().flatten(1).mean(1).double()
    if weighting == "min_snr":
        weight = ((1 - sigma) / sigma).square().clamp(max=5) * sigma.square()
    else:
        weight = compute_loss_weighting_for_sd3(weighting, sigma)
    torch.testing.assert_close(out.diffusion_per_sample.double(), weight * plain, rtol=1e-4, atol=1e-5)
    assert out.num_lpl_samples == int((sigma <= 0.75).sum()) > 0
    assert step.objective is not None
    assert step.objective.p_gate == pytest.approx(0.5)  # of u: 0.75 / (3 - 2 * 0.75)
    out.loss.backward()
    assert scale.grad is not None
    assert math.isfinite(float(scale.grad))


def test_unknown_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="'cubic' of flow matching"):
        flow_weight("cubic", torch.ones(1))


@pytest.mark.parametrize(
    ("options", "is_flow", "message"),
    [
        ({"loss_weighting": "p2"}, True, "--loss_weighting p2: the model is trained by flow matching: drop it"),
        ({"loss_weighting": "cosmap"}, False, "--loss_weighting cosmap: the model has a discrete schedule"),
        ({"timestep_distribution": "mode", "timestep_shift": 3.0}, False, "mode, --timestep_shift 3.0: .* drop them$"),
        ({"timestep_bias_strategy": "later"}, True, "--timestep_bias_strategy later: the model is trained by flow"),
        ({"loss_weighting": "cosmap", "timestep_distribution": "mode", "timestep_shift": 3.0}, True, None),
        ({"loss_weighting": "debiased", "timestep_distribution": "logit_normal"}, False, None),
    ],
)
def test_options_that_do_not_go_with_a_schedule(options: Any, is_flow: bool, message: str | None) -> None:
    config = TrainConfig(diffusion=DiffusionConfig(**options))
    if message is None:
        check_model_options(config, "X", is_flow, frozenset())
        return
    with pytest.raises(UserError, match=message):
        check_model_options(config, "X", is_flow, frozenset())


def test_options_that_a_family_has_not() -> None:
    config = TrainConfig(model=ModelConfig(clip_skip=1, train_text_encoder=True))
    check_model_options(config, "X", False, frozenset({"clip_skip", "train_text_encoder"}))
    with pytest.raises(UserError, match=r"^--train_text_encoder True: no model of X has that: drop it$"):
        check_model_options(config, "X", False, frozenset({"clip_skip"}))
