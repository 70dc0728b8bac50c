"""The diffusion loss of each sample: squared or pseudo-Huber error, its weight by SNR, and masks.

The threshold c of the scheduled pseudo-Huber loss is set per sample:

    loss = 2 c (sqrt(d^2 + c^2) - c)    of each difference d: d^2 where |d| << c, 2 c |d| where |d| >> c

Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
(arXiv 2403.16728), in the form of kohya-ss/sd-scripts' --loss_type huber: twice the paper's delta^2 (sqrt(1 +
(d / delta)^2) - 1), for each value separately, so that for large c it approaches the mean squared error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lpl.diffusion.prediction import expand

SCHEDULES = ("constant", "exponential", "snr")


def huber_threshold(
    schedule: str, huber_c: float, timesteps: Tensor, num_timesteps: int, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """c of each sample, (B,), float64.

        constant     c = huber_c
        exponential  c = huber_c^(t / T): 1 at t = 0, huber_c at t = T
        snr          c = (1 - huber_c) / (1 + sigma / alpha)^2 + huber_c: 1 without noise, huber_c in pure noise

    Args:
        schedule: one of SCHEDULES.
        huber_c: above 0.
        timesteps: (B,), in 0..T.
        num_timesteps: T.
        alpha, sigma: (B,), as in prediction.py.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule == "constant":
        return torch.full(timesteps.shape, huber_c, dtype=torch.float64)
    if schedule == "exponential":
        return huber_c ** (timesteps.double() / num_timesteps)
    if schedule == "snr":
        # alpha / (alpha + sigma) is 1 / (1 + sigma / alpha), also where alpha is 0.
        return (1 - huber_c) * (alpha / (alpha + sigma)).double().square() + huber_c
    raise ValueError(f"unknown huber schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


DEBIASED_MAX_SNR = 1000.0
"""Debiased estimation clamps the SNR to this (kohya-ss/sd-scripts' bound)."""


def debiased_weight(snr: Tensor, prediction_type: str) -> Tensor:
    """Debiased estimation: w = 1 / sqrt(min(SNR, 1000)) on the error of epsilon, (B,).

    Source: Yu et al. 2023, "Debias the Training of Diffusion Models" (arXiv 2310.08442); the bound is kohya's.

    Raises:
        ValueError: the prediction type is not epsilon, v_prediction or sample.
    """
    # Written so that SNR = 0 gives 0 for v and sample, and no 0 * inf.
    if prediction_type == "epsilon":
        return snr.clamp(max=DEBIASED_MAX_SNR).rsqrt()
    excess = (snr / DEBIASED_MAX_SNR).clamp_min(1).sqrt()
    return snr.sqrt() * excess * _per_snr(snr, prediction_type)


def p2_weight(snr: Tensor, gamma: float, k: float, prediction_type: str) -> Tensor:
    """P2 weighting: w = 1 / (k + SNR)^gamma on the error of epsilon, (B,).

    Source: Choi et al., CVPR 2022, "Perception Prioritized Training of Diffusion Models" (arXiv 2204.00227).

    Args:
        snr: (B,), finite.
        gamma: strength, 0 or more; the paper takes 0.5 or 1.
        k: above 0; the paper takes 1.
        prediction_type: epsilon, v_prediction or sample.

    Raises:
        ValueError: another prediction type.
    """
    weight = (k + snr) ** -gamma
    return weight if prediction_type == "epsilon" else weight * snr * _per_snr(snr, prediction_type)


def _per_snr(snr: Tensor, prediction_type: str) -> Tensor:
    """The factor that turns SNR * w, the weight on the error of x0, into the weight on the output's error."""
    if prediction_type == "v_prediction":
        return 1 / (snr + 1)
    if prediction_type == "sample":
        return torch.ones_like(snr)
    raise ValueError(f"this weighting is for epsilon, v_prediction and sample, not {prediction_type}")


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str, sigma: Tensor | None = None) -> Tensor:
    """Weight of each sample's loss, (B,), with m = min(SNR, gamma).

        epsilon m / SNR    v_prediction m / (SNR + 1)    sample m    flow m * sigma^2

    Each is m times |do/dx0|^-2: the weight m on the implied x0 error, stated for the model's output.

    Raises:
        ValueError: flow without sigma.
    """
    m = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        # SNR = 0 (a zero-terminal schedule) carries no signal: weight 1, the limit of m / SNR.
        return torch.where(snr > 0, m / snr.clamp_min(torch.finfo(snr.dtype).tiny), torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return m / (snr + 1)
    if prediction_type == "sample":
        return m
    if sigma is None:
        raise ValueError("min-SNR weighting of a flow model needs sigma")
    return m * sigma.square()


def flow_weight(kind: str, sigma: Tensor) -> Tensor:
    """Weight of each sample's flow-matching loss, (B,).

        sigma_sqrt    1 / sigma^2
        cosmap        2 / (pi (1 - 2 sigma + 2 sigma^2))

    Source: Esser et al. 2024 (arXiv 2403.03206), appendix B, under the names of diffusers' scripts.

    Raises:
        ValueError: another kind.
    """
    if kind == "sigma_sqrt":
        return sigma**-2
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    raise ValueError(f"unknown weighting {kind!r} of flow matching")


def diffusion_loss(
    model_output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    huber_c: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """weight_i * mean(f(model_output_i - target_i)), (B,), in float32, for tensors (B, C, ...).

    f(d) = d^2, or with huber_c, (B,) and above 0:    f(d) = 2 c (sqrt(d^2 + c^2) - c)

    With a mask m, (B, 1, ...) in [0, 1], the mean is sum(m f) / (C sum(m)), as LPL's at each layer: a small masked
    region has as much gradient as a whole image, and LPL keeps its share. 0 where the mask is 0 everywhere. Differs
    from kohya-ss/sd-scripts and OneTrainer's default, which divide by the whole area.
    """
    square = (model_output.float() - target.float()).square()
    if huber_c is not None:
        c = expand(huber_c.to(square.dtype), square)
        # 2 c (sqrt(d^2 + c^2) - c) without its cancellation where d is small
        square = 2 * c * square / ((square + c.square()).sqrt() + c)
    if mask is None:
        loss = square.flatten(1).mean(1)
    else:
        counted = (mask.to(square.dtype) * square).flatten(1).sum(1)
        total = square.shape[1] * mask.to(square.dtype).flatten(1).sum(1)
        loss = counted / torch.where(total > 0, total, 1)
    return loss if weight is None else loss * weight.to(loss)
