"""Where LPL applies: the noise-level gate, the probability of passing it, and the scale by SNR."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from lpl.base.arguments import function, is_number
from lpl.diffusion.own_process import AlphaSigma, OwnProcess
from lpl.diffusion.prediction import signal_to_noise
from lpl.diffusion.schedule import Distribution, Schedule, schedule_of
from lpl.perceptual.defaults import SIGMA_THRESHOLD
from lpl.perceptual.input_checks import check_sigmas, check_timesteps

DEFAULT_SNR_GAMMA = 5.0
DRAWS = 200_000
"""Levels drawn to estimate a probability, which is then within 0.003 of the true one."""

Sampler = Callable[[int], Any]
"""Draws n noise levels, (n,), as a training loop does: what its calls pass as timesteps, or as sigmas for flow
matching; where each call passes both alphas and sigmas, the pair of them."""


class Gate:
    """Passes a sample whose noise level is low enough for its clean estimate to mean something.

    One of three conditions, with x = alpha * x0 + sigma * eps:

        t < t_threshold                     timesteps of the schedule, 0 the least noise; for flow matching T * sigma
        SNR >= snr_threshold                SNR = (alpha / sigma)^2
        noise/signal <= sigma_threshold     noise/signal = sigma / alpha = 1 / sqrt(SNR); EDM's sigma, where alpha is 1

    By default noise/signal <= 3: SNR >= 1/9 (not 3), and t < 674 on SDXL's schedule. For flow matching that is sigma <=
    0.75 (noise/signal is sigma / (1 - sigma)). Where sigma = s u / (1 + (s - 1) u) with a shift s, it passes 75 % of
    uniform u at shift 1 and 50 % at shift 3; of logit-normal u 86 % and 50 %.

    Source: Berrada et al., ICLR 2025, section 3.2, where it is sigma <= tau; the diffusers project has t < 200.

    Args:
        noise_scheduler: a Schedule, or what schedule_of takes: a diffusers scheduler with alphas_cumprod, or a
            flow-matching one without; None: flow matching, with sigma * 1000 as t.
        alpha_sigma: instead of noise_scheduler, a process of the caller's own: its function, or an OwnProcess.
        t_threshold, snr_threshold, sigma_threshold: at most one of them.

    Raises:
        ValueError: more than one threshold, one outside the schedule, or one that no timestep passes; a scheduler of
            neither kind.
    """

    def __init__(
        self,
        noise_scheduler: Any = None,
        t_threshold: int | None = None,
        snr_threshold: float | None = None,
        sigma_threshold: float | None = None,
        *,
        alpha_sigma: AlphaSigma | OwnProcess | None = None,
    ) -> None:
        given = [v for v in (t_threshold, snr_threshold, sigma_threshold) if v is not None]
        if len(given) > 1:
            raise ValueError("contradictory gates: give one of lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold")
        if not given:
            sigma_threshold = SIGMA_THRESHOLD
        for name, bound in (("lpl_snr_threshold", snr_threshold), ("lpl_sigma_threshold", sigma_threshold)):
            if bound is not None and not (is_number(bound) and bound >= 0):
                raise ValueError(f"{name} must be a number of 0 or more, not {bound!r}")
        self.t_threshold, self.snr_threshold, self.sigma_threshold = t_threshold, snr_threshold, sigma_threshold
        self.process: OwnProcess | None = None
        if alpha_sigma is not None:
            if noise_scheduler is not None or t_threshold is not None:
                other = "noise_scheduler" if noise_scheduler is not None else "lpl_t_threshold, which counts timesteps"
                raise ValueError(f"alpha_sigma does not go with {other}: gate by lpl_sigma_threshold, noise/signal")
            self.process = alpha_sigma if isinstance(alpha_sigma, OwnProcess) else OwnProcess(alpha_sigma)
            self.is_flow = False
            return
        own_kind = hasattr(noise_scheduler, "alpha_sigma")
        self.schedule: Schedule = noise_scheduler if own_kind else schedule_of(noise_scheduler)
        self.num_timesteps, self.is_flow = self.schedule.num_timesteps, self.schedule.is_flow
        if t_threshold is not None and not (is_number(t_threshold) and t_threshold == int(t_threshold)):
            raise ValueError(f"lpl_t_threshold counts timesteps of 0..{self.num_timesteps - 1}, so not {t_threshold!r}")
        if t_threshold is not None and not 0 < t_threshold <= self.num_timesteps:
            raise ValueError(
                f"lpl_t_threshold {t_threshold} lies outside the schedule's 1..{self.num_timesteps} timesteps"
            )
        self.table = self.opens(self.schedule.at(range(self.num_timesteps)))
        if not self.table.any():
            raise ValueError(f"no timestep of the schedule passes the gate {self}")

    def opens(self, levels: Tensor) -> Tensor:
        """Whether the gate is open at levels of its schedule, any shape; bool."""
        return self._open(self.schedule.timesteps(levels), *self.schedule.alpha_sigma(levels))

    def passes(self, timesteps: Tensor | None, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Which samples pass, (B,) bool; alpha and sigma (B,) as in prediction.py, timesteps not used for flow."""
        if self.is_flow:
            timesteps = sigma * self.num_timesteps
        return self._open(timesteps, alpha, sigma)

    def probability(self, p_gate: float | Tensor | Distribution | Sampler | None) -> float:
        """The probability that a sample passes.

        Args:
            p_gate: None for levels as the schedule draws them (all timesteps, or for flow all sigma, alike likely,
                unless a Schedule says otherwise); a Distribution, in closed form; weights per timestep (T,); a Sampler,
                by drawing; or the probability itself.

        Raises:
            ValueError: p_gate does not go with the schedule, is None for a process of the caller's own, or is a
                probability outside (0, 1].
        """
        if p_gate is None or isinstance(p_gate, Distribution):
            if self.process is not None:
                raise ValueError(
                    "p_gate: a process of your own has no schedule to draw from: pass p_gate=, a function that draws n "
                    "levels as your loop does (lambda n: torch.rand(n)), or the probability of passing the gate"
                )
            if p_gate is not None and p_gate.shift == "resolution" and p_gate.cells == 1:
                raise ValueError(
                    "p_gate: a shift by resolution needs cells=, h * w of the latents; or give it as a number"
                )
            schedule = self.schedule if p_gate is None else self.schedule.drawing(p_gate)
            probability = schedule.probability(self.passes)
        elif isinstance(p_gate, Tensor):
            if self.is_flow or self.process is not None or p_gate.shape != (self.num_timesteps,):
                raise ValueError(f"p_gate as weights needs one per timestep of a discrete schedule, not {p_gate.shape}")
            weights = p_gate.detach().cpu().double()
            if not (weights >= 0).all():
                raise ValueError("p_gate has weights that are negative or NaN: pass those of your draws")
            probability = float(weights[self.table].sum() / weights.sum())
        elif isinstance(p_gate, Real):
            probability = float(p_gate)
        elif callable(p_gate):
            probability = probability_of(self, p_gate)
        else:
            raise ValueError(
                f"p_gate is a {type(p_gate).__name__}: pass a number, a Distribution, a function that draws n levels, "
                "or a tensor of weights per timestep"
            )
        if not 0 < probability <= 1:
            raise ValueError(f"p_gate is {probability}: no timestep that is drawn passes the gate {self}")
        return probability

    def _open(self, timesteps: Tensor | None, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.t_threshold is not None:
            assert timesteps is not None
            return timesteps < self.t_threshold
        if self.snr_threshold is not None:
            return signal_to_noise(alpha, sigma) >= self.snr_threshold
        assert self.sigma_threshold is not None
        return sigma <= self.sigma_threshold * alpha

    def __str__(self) -> str:
        if self.t_threshold is not None:
            return f"t < {self.t_threshold}"
        if self.snr_threshold is not None:
            return f"SNR >= {self.snr_threshold}"
        return f"noise/signal <= {self.sigma_threshold:g}"


def probability_of(gate: Gate, sampler: Sampler) -> float:
    """The probability that a drawn level passes a gate, from 200,000 draws.

    Args:
        gate: on the schedule or process that the levels are of.
        sampler: draws n levels; called with n.

    Raises:
        ValueError: the sampler does not take n, or does not return n levels of the gate's schedule.
    """
    if not isinstance(gate, Gate):
        raise ValueError(f"gate is a {type(gate).__name__}: pass a Gate, such as Gate(sigma_threshold=3.0)")
    function("the sampler of levels", sampler, "n")
    levels = sampler(DRAWS)
    if gate.process is not None:
        alpha, sigma = gate.process.alpha_sigma(levels)
        if len(alpha) != DRAWS:
            raise ValueError(f"the sampler drew {len(alpha)} levels where it was asked for {DRAWS}")
        return float(gate.passes(None, alpha, sigma).cpu().double().mean())
    levels = check_sigmas(levels, DRAWS) if gate.is_flow else check_timesteps(levels, DRAWS, gate.num_timesteps)
    return float(gate.opens(levels).cpu().double().mean())


def snr_scale(snr: Tensor, gamma: float | None) -> Tensor:
    """min(1, g / SNR) with g = gamma or 5, (B,).

    One rule for every parameterisation, since LPL lives in x0 space. Differs from the diffusers project: its rule for
    v_prediction has a further factor SNR / (SNR + 1).
    """
    return ((gamma or DEFAULT_SNR_GAMMA) / snr).clamp(max=1)
