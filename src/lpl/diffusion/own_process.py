"""A process of the caller's own, x = alpha * x0 + sigma * eps, without a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AlphaSigma = Callable[[Any], tuple[Tensor, Tensor]]
"""From the loop's times, (B,), to alpha and sigma, (B,) each."""

RULES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "v_prediction": ("alpha^2 + sigma^2", lambda alpha, sigma: alpha.square() + sigma.square()),
    "flow": ("alpha + sigma", torch.add),
    "flow_to_data": ("alpha + sigma", torch.add),
}
"""What must be 1 in a process of a prediction type."""
ROUNDING = 1e-2
"""Tolerance for that 1: coefficients may be of half precision."""
ROUNDED = 1e-4
"""Tolerance below 0, for values such as the cosine of pi / 2."""


@dataclass(frozen=True)
class OwnProcess:
    """Coefficients from a function of time, or as the caller passes them.

    Args:
        function: alpha and sigma of times; None: levels are the pair (alphas, sigmas).
        prediction_type: what the model predicts, see prediction.py.
    """

    function: AlphaSigma | None = None
    prediction_type: Any = "epsilon"

    is_flow = False

    def alpha_sigma(self, levels: Any) -> tuple[Tensor, Tensor]:
        """The coefficients of noisy latents, (B,) float64 each, on the CPU.

        Raises:
            ValueError: they are no pair of finite (B,) of 0 or more, or break the rule of prediction_type (RULES).
        """
        source = "alphas and sigmas" if self.function is None else "alpha_sigma"
        pair = levels if self.function is None else self.function(levels)
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            raise ValueError(f"{source}: a {type(pair).__name__}; give two tensors (B,), alpha and sigma")
        alpha, sigma = (part.detach().cpu().double() for part in pair)
        size = None if self.function is None or not isinstance(levels, Tensor) else len(levels)
        if alpha.dim() != 1 or alpha.shape != sigma.shape or (size is not None and len(alpha) != size):
            raise ValueError(f"{source}: shapes {tuple(alpha.shape)} and {tuple(sigma.shape)}; give one value a sample")
        for name, values in (("alpha", alpha), ("sigma", sigma)):
            if len(values) and not bool((values.isfinite() & (values >= -ROUNDED)).all()):
                raise ValueError(
                    f"{source}: {name} ranges from {float(values.min()):.4g} to {float(values.max()):.4g}; those of "
                    "noisy_latents = alpha * latents + sigma * noise are finite and 0 or more"
                )
        alpha, sigma = alpha.clamp(min=0), sigma.clamp(min=0)
        nothing = ((alpha == 0) & (sigma == 0)).nonzero().flatten()
        if len(nothing):
            raise ValueError(
                f"{source}: alpha and sigma of sample {int(nothing[0])} are both 0, so its noisy latents are too; for "
                "samples that are left out (active) pass those of any level"
            )
        if self.prediction_type in RULES:
            name, rule = RULES[self.prediction_type]
            total = rule(alpha, sigma)
            if len(total) and float((total - 1).abs().max()) > ROUNDING:
                raise ValueError(
                    f"{source}: {name} is {float(total[(total - 1).abs().argmax()]):.4g}, and {self.prediction_type!r} "
                    "is of processes where it is 1: pass a function of alpha and sigma as prediction_type, see "
                    "lpl.diffusion.prediction"
                )
        return alpha, sigma
