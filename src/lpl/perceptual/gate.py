"""Where LPL applies: the noise-level gate, the probability of passing it, and the scale by SNR."""

from numbers import Real
from typing import Any

from torch import Tensor

from lpl.diffusion.prediction import signal_to_noise
from lpl.diffusion.schedule import schedule_of
from lpl.perceptual.defaults import SIGMA_THRESHOLD

DEFAULT_SNR_GAMMA = 5.0


class Gate:
    """Passes a sample whose noise level is low enough for its clean estimate to mean something.

    One of three statements: t < t_threshold (t of the schedule's timesteps; for flow matching t = T * sigma), SNR >=
    snr_threshold, or sigma / alpha <= sigma_threshold. Without any, sigma / alpha <= 3: t < 674 on SDXL's schedule.

    For flow matching that is sigma <= 0.75. Where sigma = s u / (1 + (s - 1) u) with a shift s, it passes 75 % of
    uniform u at shift 1 and 50 % at shift 3; of logit-normal u 86 % and 50 %.

    Source: Berrada et al., ICLR 2025, section 3.2, where it is sigma <= tau; the diffusers project has t < 200.

    Args:
        noise_scheduler: a Schedule, or what schedule_of takes: a diffusers scheduler with alphas_cumprod, or a
            flow-matching one without; None: flow matching, with sigma * 1000 as t.
        t_threshold, snr_threshold, sigma_threshold: at most one of them.

    Raises:
        ValueError: more than one statement, one outside the schedule, or one that no timestep passes; a scheduler that
            is neither.
    """

    def __init__(
        self,
        noise_scheduler: Any,
        t_threshold: int | None = None,
        snr_threshold: float | None = None,
        sigma_threshold: float | None = None,
    ) -> None:
        given = [v for v in (t_threshold, snr_threshold, sigma_threshold) if v is not None]
        if len(given) > 1:
            raise ValueError("contradictory gates: give one of lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold")
        self.schedule = schedule_of(noise_scheduler)
        self.num_timesteps, self.is_flow = self.schedule.num_timesteps, self.schedule.is_flow
        if not given:
            sigma_threshold = SIGMA_THRESHOLD
        if t_threshold is not None and t_threshold != int(t_threshold):
            raise ValueError(f"lpl_t_threshold counts timesteps of 0..{self.num_timesteps - 1}, so not {t_threshold}")
        if t_threshold is not None and not 0 < t_threshold <= self.num_timesteps:
            raise ValueError(
                f"lpl_t_threshold {t_threshold} lies outside the schedule's 1..{self.num_timesteps} timesteps"
            )
        self.t_threshold, self.snr_threshold, self.sigma_threshold = t_threshold, snr_threshold, sigma_threshold
        self.table = self.opens(self.schedule.at(range(self.num_timesteps)))
        if not self.table.any():
            raise ValueError(f"no timestep of the schedule passes the gate {self}")

    def opens(self, levels: Tensor) -> Tensor:
        """Whether it is open at levels of its schedule, any shape; bool."""
        return self._open(self.schedule.timesteps(levels), *self.schedule.alpha_sigma(levels))

    def passes(self, timesteps: Tensor | None, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Which samples pass, (B,) bool; alpha and sigma (B,) as in prediction.py, timesteps not used for flow."""
        if self.is_flow or timesteps is None:
            return self._open(sigma * self.num_timesteps, alpha, sigma)
        return self._open(timesteps, alpha, sigma)

    def probability(self, p_gate: float | Tensor | None) -> float:
        """The probability that a sample passes.

        Args:
            p_gate: None for levels as the schedule draws them (all timesteps, or for flow all sigma, alike likely,
                unless a Schedule says otherwise), weights per timestep (T,), or the probability itself.

        Raises:
            ValueError: weights of the wrong length or for a flow schedule, or a probability outside (0, 1].
        """
        if p_gate is None:
            probability = self.schedule.probability(self.passes)
        elif isinstance(p_gate, Tensor):
            if self.is_flow or p_gate.shape != (self.num_timesteps,):
                raise ValueError(f"p_gate as weights needs one per timestep of a discrete schedule, not {p_gate.shape}")
            weights = p_gate.detach().double().cpu()
            if not (weights >= 0).all():
                raise ValueError("p_gate has weights that are negative or no numbers: pass those of your draws")
            probability = float(weights[self.table].sum() / weights.sum())
        elif isinstance(p_gate, Real):
            probability = float(p_gate)
        else:
            raise ValueError(f"p_gate is a {type(p_gate).__name__}: pass a number, or a tensor of weights per timestep")
        if not 0 < probability <= 1:
            raise ValueError(f"p_gate is {probability}: no timestep that is drawn passes the gate {self}")
        return probability

    def _open(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.t_threshold is not None:
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


def snr_scale(snr: Tensor, gamma: float | None) -> Tensor:
    """min(1, g / SNR) with g = gamma or 5, (B,).

    One rule for every parameterisation, since LPL lives in x0 space. Differs from the diffusers project: its rule for
    v_prediction has a further factor SNR / (SNR + 1).
    """
    return ((gamma or DEFAULT_SNR_GAMMA) / snr).clamp(max=1)
