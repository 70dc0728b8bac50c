"""One training step's loss, without accelerate: draws, noise, denoiser, diffusion loss, LPL."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lpl.base.errors import UserError
from lpl.config import DiffusionConfig
from lpl.data.dataset import Batch
from lpl.diffusion.draws import draw_normal, keyed_quantile, keyed_uniform, pyramid_noise
from lpl.diffusion.losses import (
    debiased_weight,
    diffusion_loss,
    flow_weight,
    huber_threshold,
    min_snr_weight,
    p2_weight,
)
from lpl.diffusion.prediction import add_noise, signal_to_noise, target_of, x0_from_output
from lpl.diffusion.schedule import Distribution, Schedule
from lpl.families.base import Family
from lpl.perceptual.objective import PerceptualObjective


class StepLoss(NamedTuple):
    """The loss of one micro-batch."""

    loss: Tensor
    """Scalar: diffusion loss plus weighted LPL."""
    diffusion_per_sample: Tensor
    """(B,), detached."""
    lpl: Tensor
    """Scalar, weighted, detached."""
    metrics: dict[str, Tensor | float]
    num_lpl_samples: int


class Drawn(NamedTuple):
    """What was drawn for a micro-batch, on the CPU."""

    noise: Tensor
    levels: Tensor
    """(B,), noise levels of the schedule."""


class StepInputs(NamedTuple):
    """What the losses of a batch are computed from; (B, C, h, w) in model space, on the device."""

    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    model_output: Tensor
    """Float32."""
    target: Tensor
    """What the output should be."""
    levels: Tensor
    """(B,), noise levels of the schedule, on the CPU."""
    alpha: Tensor
    """(B,), float32, on the CPU; sigma likewise."""
    sigma: Tensor
    mask: Tensor | None
    """(B, 1, h, w), how much each location counts."""

    def x0(self, prediction_type: str) -> Tensor:
        """The clean latent that the output implies, differentiable in it."""
        return x0_from_output(self.model_output, self.noisy_latents, self.alpha, self.sigma, prediction_type)


class TrainingStep:
    """Computes the loss of a micro-batch; holds what is the same at every step.

    Args:
        objective: LPL, or None for the plain diffusion objective.
        autocast: precision of the denoiser's arithmetic if its wrapper does not set it; None: the wrapper does.
    """

    def __init__(
        self,
        family: Family,
        config: DiffusionConfig,
        objective: PerceptualObjective | None,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.family, self.config, self.objective, self.seed = family, config, objective, seed
        self.autocast = autocast
        self.schedule = run_schedule(family.schedule, config)
        self.prediction_type = self.schedule.prediction_type
        self.latent_space = family.latent_space

    def draw(self, batch: Batch) -> Drawn:
        """Noise and noise levels of a batch, keyed by sample and by how often it was drawn; levels by its strata."""
        shape = tuple(batch.raw_latents.shape[1:])
        noise, quantiles = [], []
        strata, of = batch.strata or ([0] * len(batch.sample_ids), 1)
        keys = zip(batch.sample_ids, batch.counts, strict=True)
        for stratum, key in zip(strata, keys, strict=True):
            eps = draw_normal(shape, self.seed, "noise", *key)
            if self.config.noise_offset:
                eps = eps + self.config.noise_offset * draw_normal((shape[0], 1, 1), self.seed, "noise_offset", *key)
            if self.config.pyramid_noise_iterations:
                levels, discount = self.config.pyramid_noise_iterations, self.config.pyramid_noise_discount
                eps = pyramid_noise(eps, levels, discount, self.seed, "pyramid", *key)
            noise.append(eps)
            quantiles.append(keyed_quantile(self.seed, "timestep", *key, stratum=stratum, strata=of))
        return Drawn(torch.stack(noise), self.schedule.levels(quantiles, shape[-2] * shape[-1]))

    def _windows(self, batch: Batch) -> Tensor:
        """Where --lpl_crop's window of each sample lies, (B, 2), keyed as the noise is."""
        keys = zip(batch.sample_ids, batch.counts, strict=True)
        places = [[keyed_uniform(self.seed, f"lpl_crop_{axis}", *key) for axis in "yx"] for key in keys]
        return torch.tensor(places, dtype=torch.float64)

    def _weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Weight of each sample's diffusion loss, (B,), or None where all are 1."""
        config, kind = self.config, self.prediction_type
        snr = signal_to_noise(alpha, sigma).float()
        if config.snr_gamma is not None:
            return min_snr_weight(snr, config.snr_gamma, kind, sigma)
        if config.loss_weighting == "debiased":
            return debiased_weight(snr, kind)
        if config.loss_weighting == "p2":
            return p2_weight(snr, config.p2_gamma, config.p2_k, kind)
        return None if config.loss_weighting == "none" else flow_weight(config.loss_weighting, sigma)

    def _huber_c(self, levels: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        if self.config.loss_type != "huber":
            return None
        schedule, config = self.schedule, self.config
        timesteps = schedule.timesteps(levels)
        return huber_threshold(config.huber_schedule, config.huber_c, timesteps, schedule.num_timesteps, alpha, sigma)

    def denoise(
        self, denoiser: nn.Module, batch: Batch, noise: Tensor, levels: Tensor, device: torch.device
    ) -> StepInputs:
        """Adds noise to a batch and runs the model; batch, noise (B, C, h, w) and noise levels (B,) are on the CPU."""
        alpha, sigma = (values.float() for values in self.schedule.alpha_sigma(levels))
        latents, noise = self.latent_space.from_raw(_send(batch.raw_latents, device)), _send(noise, device)
        noisy_latents = add_noise(latents, noise, alpha, sigma)
        text = {name: value if name == "lengths" else _send(value, device) for name, value in batch.text.items()}
        extra = {name: _send(value, device) for name, value in batch.extra.items()}
        sent = _send(sigma if self.schedule.is_flow else levels, device)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            output = self.family.denoise(denoiser, noisy_latents, sent, text, extra).float()
        target = target_of(latents, noise, alpha, sigma, self.prediction_type)
        mask = None if batch.mask is None else _send(batch.mask, device)
        return StepInputs(latents, noise, noisy_latents, output, target, levels, alpha, sigma, mask)

    def diffusion_per_sample(self, inputs: StepInputs) -> Tensor:
        """The diffusion loss of each sample with the run's weighting, (B,)."""
        alpha, sigma = self.schedule.alpha_sigma(inputs.levels)
        weight, huber_c = self._weight(alpha, sigma), self._huber_c(inputs.levels, alpha, sigma)
        return diffusion_loss(inputs.model_output, inputs.target, weight, huber_c, inputs.mask)

    def __call__(self, denoiser: nn.Module, batch: Batch, device: torch.device, use_lpl: bool, step: int) -> StepLoss:
        """The loss of a micro-batch of an optimizer step; the batch's tensors are on the CPU."""
        draws = self.draw(batch)
        inputs = self.denoise(denoiser, batch, draws.noise, draws.levels, device)
        # A tensor of its own: LPL differentiates with respect to it, and this must not set off an engine's hooks on the
        # output, which are for the backward pass.
        inputs = inputs._replace(model_output=inputs.model_output.view_as(inputs.model_output))
        per_sample = self.diffusion_per_sample(inputs)
        weights = None if batch.weights is None else _send(batch.weights, device)
        loss = (per_sample if weights is None else per_sample * weights).mean()
        metrics: dict[str, Tensor | float] = {"diffusion_loss": loss.detach()}
        if not use_lpl or self.objective is None:
            return StepLoss(loss, per_sample.detach(), torch.zeros_like(loss).detach(), metrics, 0)
        term = self.objective(
            inputs.model_output,
            inputs.noisy_latents,
            inputs.latents,
            timesteps=None if self.schedule.is_flow else inputs.levels,
            sigmas=inputs.sigma if self.schedule.is_flow else None,
            diffusion_loss=loss,
            sample_weight=weights,
            mask=inputs.mask,
            step=step,
            windows=self._windows(batch) if self.objective.loss_fn.crop is not None else None,
            draws=None if batch.lpl_draws is None else torch.tensor(batch.lpl_draws, dtype=torch.float64),
        )
        return StepLoss(
            loss + term.loss, per_sample.detach(), term.loss.detach(), metrics | term.metrics, term.num_samples
        )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting, which only works from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def run_schedule(schedule: Schedule, config: DiffusionConfig, cells: int = 1) -> Schedule:
    """A schedule with levels drawn as the options say.

    Args:
        cells: h * w of the run's usual latents.

    Raises:
        UserError: a range outside the schedule, or nothing left to draw.
    """
    strategy = config.timestep_bias_strategy
    try:
        return schedule.drawing(
            Distribution(
                config.timestep_distribution,
                config.logit_mean,
                config.logit_std,
                config.mode_scale,
                (
                    strategy,
                    config.timestep_bias_multiplier,
                    config.timestep_bias_portion,
                    config.timestep_bias_begin,
                    config.timestep_bias_end,
                ),
                schedule.shift if config.timestep_shift is None else config.timestep_shift,
                cells,
            )
        )
    except ValueError as error:
        raise UserError(f"--timestep_bias_strategy {strategy}: {error}") from error
