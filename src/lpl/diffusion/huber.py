"""The threshold of the scheduled pseudo-Huber loss.

    loss = 2 c (sqrt(d^2 + c^2) - c)    of each difference d: d^2 where |d| << c, 2 c |d| where |d| >> c

Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
(arXiv 2403.16728), in the form of kohya-ss/sd-scripts' --loss_type huber: twice the paper's delta^2 (sqrt(1 +
(d / delta)^2) - 1), of each value by itself, so that it meets the mean squared error for large c.
"""

import torch
from torch import Tensor

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
        timesteps: (B,), integers in 0..T - 1.
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
