"""Weights of the diffusion loss by noise level, beside min-SNR (diffusion_loss.py).

A weight w on the mean squared error of epsilon is stated for the model's output: on a variance-preserving schedule
|d epsilon|^2 = SNR |d x0|^2, |d v|^2 = (SNR + 1) |d x0|^2, so the same objective is

    epsilon  w        v_prediction  w * SNR / (SNR + 1)        sample  w * SNR

Differs from kohya-ss/sd-scripts: for v its debiased weight is 1 / (SNR + 1), without the factor sqrt(SNR).
"""

import torch
from torch import Tensor

DEBIASED_MAX_SNR = 1000.0
"""Debiased estimation takes no SNR for higher than this (kohya-ss/sd-scripts' bound)."""


def debiased_weight(snr: Tensor, prediction_type: str) -> Tensor:
    """Debiased estimation: w = 1 / sqrt(min(SNR, 1000)) on the error of epsilon, (B,).

    Source: Yu et al. 2023, "Debias the Training of Diffusion Models" (arXiv 2310.08442); the bound is kohya's.

    Raises:
        ValueError: a prediction type that is none of epsilon, v_prediction and sample.
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
    """What turns SNR * w, the weight on the error of x0, into the weight on the output's error."""
    if prediction_type == "v_prediction":
        return 1 / (snr + 1)
    if prediction_type == "sample":
        return torch.ones_like(snr)
    raise ValueError(f"this weighting is for epsilon, v_prediction and sample, not {prediction_type}")
