"""Which prediction a diffusion loss trains, by its gradient at the model's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpl.diffusion.prediction import Convention, expand, target_of

AGAINST = -0.5
"""A cosine below this means that the loss moves the output away from the target."""
FOLLOWS, CLEARLY = 0.9, 0.1
"""Cosine (see alignment) to a target that a loss trains, at least; and its lead over the declared target's."""


@torch.no_grad()
def alignment(
    diffusion_gradient: Tensor,
    model_output: Tensor,
    noisy_latents: Tensor,
    latents: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str | Convention,
) -> Tensor:
    """The cosine of the diffusion loss's gradient and output - target, (B,): above 0 where it trains that target.

    Args:
        diffusion_gradient, model_output, noisy_latents, latents: (B, C, ...).
        alpha, sigma: (B,), sigma above 0.
        prediction_type: determines the target, see prediction.py.
    """
    alpha, sigma, x0 = alpha.to(noisy_latents.dtype), sigma.to(noisy_latents.dtype), latents.to(noisy_latents.dtype)
    noise = (noisy_latents - expand(alpha, x0) * x0) / expand(sigma, x0)
    error = model_output.to(x0.dtype) - target_of(x0, noise, alpha, sigma, prediction_type)
    return torch.cosine_similarity(diffusion_gradient.to(x0.dtype).flatten(1), error.flatten(1))


def direction_fault(
    tensors: Sequence[Tensor], alpha: Tensor, sigma: Tensor, prediction_type: str | Convention, known: Sequence[str]
) -> str | None:
    """The message where a diffusion loss trains another target than prediction_type's, or none; else None.

    A squared error's gradient has the direction of output - target, whatever its weight; an absolute error's nearly.

    Args:
        tensors: the gradient, the model's output, noisy latents and latents, see alignment.
        alpha, sigma: (B,), on the CPU.
        prediction_type: the declared one.
        known: the prediction types to compare.
    """

    def along(kind: str | Convention) -> float:
        gradient, output, noisy, latents = tensors
        return float(alignment(gradient, output, noisy, latents, alpha, sigma, kind).mean())

    declared = along(prediction_type)
    others = {name: along(name) for name in known}
    best = max(others, key=lambda name: others[name])
    if others[best] > max(FOLLOWS, declared + CLEARLY):
        return (
            f"diffusion_loss draws model_output to what prediction_type {best!r} says (cosine {others[best]:.2f}), not "
            f"{prediction_type!r} (cosine {declared:.2f}): pass prediction_type={best!r}"
        )
    if declared < AGAINST:
        return (
            f"diffusion_loss draws model_output away from what prediction_type {prediction_type!r} says (cosine "
            f"{declared:.2f}): look at its sign, and at the arguments"
        )
    return None
