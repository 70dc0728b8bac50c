"""Noise schedules: what a noise level is, how levels are drawn, and how likely a drawn one passes a gate.

A noisy latent is x = alpha * x0 + sigma * eps. Levels rise with the noise:

    Discrete    t, an integer in 0..T - 1    alpha_t = sqrt(alphas_cumprod_t), sigma_t = sqrt(1 - alphas_cumprod_t)
    Flow        sigma in [0, 1]              alpha = 1 - sigma; counted in timesteps, t = T * sigma

A level is drawn by inverting its distribution function at a quantile p in [0, 1), so draws can be keyed and stratified
(draws.py). For Flow, with Phi the normal distribution function and s the shift:

    uniform         u = p
    logit_normal    u = 1 / (1 + exp(-(mean + std * Phi^-1(p))))
    mode            u = p - scale * (sin^2(pi p / 2) - p)
    sigma = s u / (1 + (s - 1) u)

Sources: Ho et al. 2020 (Discrete); Lipman et al. 2023, Liu et al. 2023 (Flow); Esser et al. 2024 (arXiv 2403.03206),
sections 3.1 (the distributions) and 5.3.2 (the shift). Differs from diffusers' scripts: their logit_mean is for 1 - u,
so its sign is opposite to the one here and in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lpl.base.arguments import is_number, positive
from lpl.diffusion.draws import timestep_probabilities
from lpl.diffusion.prediction import FLOW_TYPES, alpha_sigma_table

FLOW_TIMESTEPS = 1000
"""Number of timesteps T for flow matching, by default."""
MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Range of mode_scale in which the map from p to u is one-to-one."""
BISECTIONS = 64

Passes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From levels, alpha and sigma, (B,) each, which pass, (B,) bool; all levels up to some bound must."""


class Distribution(NamedTuple):
    """How levels are drawn: a distribution, the bias of a discrete schedule, the shift of a flow."""

    name: str = "uniform"
    """uniform or logit_normal; of a flow also mode."""
    logit_mean: float = 0.0
    """Of logit_normal; above 0 draws more noise."""
    logit_std: float = 1.0
    mode_scale: float = 1.29
    """Of mode; above 0 draws levels in the middle more often."""
    bias: tuple[str, float, float, int, int] = ("none", 1.0, 0.25, 0, 1000)
    """Strategy, multiplier, portion, begin and end: see timestep_probabilities."""
    shift: float | Literal["resolution"] = 1.0
    """For a flow: above 1 draws more noise; "resolution": by the number of latent cells, see Flow.dynamic_shift."""
    cells: int = 1
    """h * w of a run's usual latents, for a shift by resolution."""


UNIFORM = Distribution()


def _check(distribution: Distribution) -> None:
    """Raises a ValueError where a value is no number."""
    for name in ("logit_mean", "logit_std", "mode_scale"):
        if not is_number(getattr(distribution, name)):
            raise ValueError(f"Distribution: {name} must be a number, not {getattr(distribution, name)!r}")


class Schedule(Protocol):
    """What a training loop asks of a noise schedule; tensors are on the CPU."""

    @property
    def prediction_type(self) -> str:
        """What the denoiser's output is: see prediction.py."""

    @property
    def num_timesteps(self) -> int:
        """T, the unit of thresholds, bins and reports."""

    @property
    def is_flow(self) -> bool:
        """Whether levels are sigma, not integer timesteps."""

    @property
    def shift(self) -> float | Literal["resolution"]:
        """The model's own shift, for flow matching: see Distribution."""

    def drawing(self, distribution: Distribution) -> Schedule:
        """The same schedule with levels drawn from a distribution.

        Raises:
            ValueError: a distribution that this kind of schedule does not support, or with nothing left to draw.
        """

    def levels(self, quantiles: Sequence[float], cells: int | None = None) -> Tensor:
        """The levels, (B,), int64 or float64, at quantiles in [0, 1) of the distribution.

        Args:
            cells: h * w of the latents, for a shift by resolution; None: Distribution.cells.
        """

    def at(self, timesteps: Sequence[float]) -> Tensor:
        """The levels, (B,), at timesteps in 0..T, which a discrete schedule rounds down."""

    def timesteps(self, levels: Tensor) -> Tensor:
        """The timesteps of levels (B,): integers for a discrete schedule."""

    def alpha_sigma(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients of noisy latents, (B,) float64 each."""

    def probability(self, passes: Passes) -> float:
        """The probability that a drawn level passes."""

    def density(self, levels: Tensor) -> Tensor:
        """The probability per timestep at levels of any shape, float64; for a schedule that `drawing` made."""


@dataclass(frozen=True, eq=False)
class Discrete:
    """A variance-preserving schedule of T timesteps.

    Args:
        alpha, sigma: (T,), float64, as alpha_sigma_table gives them.
        weights: (T,), float64: how likely each timestep is, up to a factor.
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    weights: Tensor

    is_flow = False
    shift = 1.0

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    def drawing(self, distribution: Distribution) -> Discrete:
        _check(distribution)
        name, mean, std, _, bias, shift, _ = distribution
        if shift != 1:
            raise ValueError(f"a shift of {shift} is for flow matching, not for a discrete schedule")
        weights = timestep_probabilities(self.num_timesteps, *bias, name, mean, std)
        return replace(self, weights=weights)

    def levels(self, quantiles: Sequence[float], cells: int | None = None) -> Tensor:
        cumulative = self.weights.cumsum(0)
        points = torch.tensor(quantiles, dtype=torch.float64) * cumulative[-1]
        return torch.searchsorted(cumulative, points, right=True).clamp(max=self.num_timesteps - 1)

    def at(self, timesteps: Sequence[float]) -> Tensor:
        return torch.tensor([int(t) for t in timesteps])

    def timesteps(self, levels: Tensor) -> Tensor:
        return levels

    def alpha_sigma(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[levels], self.sigma[levels]

    def probability(self, passes: Passes) -> float:
        passed = passes(torch.arange(self.num_timesteps), self.alpha, self.sigma)
        return float(self.weights[passed].sum() / self.weights.sum())

    def density(self, levels: Tensor) -> Tensor:
        return self.weights[levels] / self.weights.sum()


@dataclass(frozen=True)
class Flow:
    """Flow matching: x = (1 - sigma) * x0 + sigma * eps.

    Args:
        dynamic_shift: (a, b): the shift "resolution" is exp(a * cells + b). The default is Flux.1's, a line through 0.5
            at 4 * 256 cells and 1.15 at 4 * 4096.
    """

    prediction_type: str = "flow"
    num_timesteps: int = FLOW_TIMESTEPS
    distribution: Distribution = UNIFORM
    dynamic_shift: tuple[float, float] = (0.65 / (4 * 3840), 0.5 - 0.65 * 256 / 3840)

    is_flow = True

    @property
    def shift(self) -> float | Literal["resolution"]:
        return self.distribution.shift

    def drawing(self, distribution: Distribution) -> Flow:
        _check(distribution)
        name, _, std, scale, bias, shift, _ = distribution
        if name not in ("uniform", "logit_normal", "mode"):
            raise ValueError(f"unknown timestep distribution {name!r}")
        if not std > 0:
            raise ValueError(f"logit_std must be positive, not {std}")
        if not MODE_SCALES[0] <= scale <= MODE_SCALES[1]:
            raise ValueError(f"mode_scale must lie in {MODE_SCALES[0]:g}..{MODE_SCALES[1]:.4g}, not {scale}")
        if shift != "resolution":
            positive("the shift", shift)
        if bias[0] != "none":
            raise ValueError(f"the timestep bias {bias[0]} is for a discrete schedule, not for flow matching")
        return replace(self, distribution=distribution)

    def levels(self, quantiles: Sequence[float], cells: int | None = None) -> Tensor:
        return self._quantile(torch.tensor(quantiles, dtype=torch.float64), cells)

    def at(self, timesteps: Sequence[float]) -> Tensor:
        return torch.tensor(timesteps, dtype=torch.float64) / self.num_timesteps

    def timesteps(self, levels: Tensor) -> Tensor:
        return levels * self.num_timesteps

    def alpha_sigma(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        levels = levels.double()
        return 1 - levels, levels

    def probability(self, passes: Passes) -> float:
        return float(self._last(lambda sigma: passes(sigma, 1 - sigma, sigma), ()))

    def density(self, levels: Tensor) -> Tensor:
        step = 1e-4  # a difference quotient, as mode has no distribution function in closed form
        above, below = (levels + step).clamp(max=1), (levels - step).clamp(min=0)
        high, low = (self._last(at.ge, levels.shape) for at in (above, below))
        return (high - low) / (above - below) / self.num_timesteps

    def _quantile(self, p: Tensor, cells: int | None = None) -> Tensor:
        """The levels, float64, at quantiles of any shape."""
        name, mean, std, scale, _, shift, usual = self.distribution
        u = p
        if name == "logit_normal":
            u = torch.sigmoid(mean + std * torch.special.ndtri(p))
        elif name == "mode":
            u = p - scale * (torch.sin(math.pi * p / 2).square() - p)
        slope, offset = self.dynamic_shift
        s = math.exp(slope * (usual if cells is None else cells) + offset) if shift == "resolution" else shift
        return s * u / (1 + (s - 1) * u)

    def _last(self, passes: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
        """The largest quantile whose level passes, up to rounding; levels rise with the quantile."""
        low, high = torch.zeros(tuple(shape), dtype=torch.float64), torch.ones(tuple(shape), dtype=torch.float64)
        high = torch.where(passes(self._quantile(high)), 2.0, high)  # everything passes: low goes to 1
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            passed = passes(self._quantile(middle.clamp(max=1)))
            low, high = torch.where(passed, middle, low), torch.where(passed, high, middle)
        return low.clamp(max=1)


def schedule_of(noise_scheduler: Any, prediction_type: str | None = None) -> Schedule:
    """The schedule of a diffusers scheduler, all levels equally likely; a Schedule is returned as it is.

    Args:
        noise_scheduler: with alphas_cumprod, or a flow-matching one without; None: flow matching, with t = 1000 sigma.
        prediction_type: what the model predicts; None: what the scheduler says ("flow" without alphas_cumprod).

    Raises:
        ValueError: a scheduler that is neither.
    """
    if isinstance(noise_scheduler, Discrete | Flow):
        return noise_scheduler if prediction_type is None else replace(noise_scheduler, prediction_type=prediction_type)
    if noise_scheduler is None:
        return Flow(prediction_type or "flow")
    config, name = getattr(noise_scheduler, "config", None), type(noise_scheduler).__name__
    count = getattr(config, "num_train_timesteps", None)
    if count is None:
        hint = "pass its .scheduler" if hasattr(noise_scheduler, "scheduler") else "pass a diffusers scheduler"
        raise ValueError(f"noise_scheduler is a {name}: {hint}, or None for flow matching")
    stated = getattr(config, "prediction_type", None)
    if getattr(noise_scheduler, "alphas_cumprod", None) is not None:
        alpha, sigma = alpha_sigma_table(noise_scheduler)
        return Discrete(alpha, sigma, prediction_type or str(stated), torch.ones_like(alpha))
    sigmas = getattr(noise_scheduler, "sigmas", None)
    most = 1.0 if sigmas is None or not len(sigmas) else float(max(sigmas))
    if most > 1 or (stated is not None and not str(stated).startswith("flow")):
        found = f"sigmas of up to {most:.4g}" if most > 1 else f"prediction_type {stated!r}"
        raise ValueError(
            f"{name} has no alphas_cumprod, and {found}: it is neither a discrete nor a flow-matching schedule; where "
            "your latents are (1 - sigma) * x0 + sigma * noise pass noise_scheduler=None and prediction_type='flow'"
        )
    return Flow(prediction_type or FLOW_TYPES[0], int(count))
