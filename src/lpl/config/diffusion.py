"""Options: the diffusion loss, its noise and its timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lpl.config.checks import check_declared, option, require


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion objective: the loss that LPL is added to."""

    snr_gamma: float | None = None
    """Min-SNR weighting of the diffusion loss with this gamma (5 is usual)."""
    noise_offset: float = 0.0
    """Scale of noise added per channel, the same for every pixel."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = "none"
    """Which timesteps are drawn more often."""
    timestep_bias_multiplier: float = 1.0
    """How much more often."""
    timestep_bias_portion: float = 0.25
    """Share of the schedule that `earlier` and `later` favour."""
    timestep_bias_begin: int = 0
    """First timestep that `range` favours."""
    timestep_bias_end: int = 1000
    """Timestep before which `range` ends."""
    loss_weighting: Literal["none", "debiased", "p2"] = "none"
    """Weight by noise level instead of --snr_gamma: debiased estimation (1/sqrt(SNR)) or P2 (1/(k + SNR)^gamma)."""
    p2_gamma: float = 1.0
    """Strength of P2 weighting."""
    p2_k: float = 1.0
    """Keeps P2's weight finite where there is all but no signal."""
    loss_type: Literal["mse", "huber"] = "mse"
    """Distance between output and target; huber: pseudo-Huber, which minds outliers less."""
    huber_c: float = 0.1
    """Differences far above this count linearly, far below it squared; with a schedule, at the noisy end."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold falls from 1 at the first timestep to --huber_c at the last."""
    pyramid_noise_iterations: int = option(0, most=100)
    """Levels of ever coarser noise that are added to the noise (6 to 10 are usual); 0: none."""
    pyramid_noise_discount: float = 0.3
    """Factor from one level to the next, coarser one."""
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn; --timestep_bias_strategy multiplies it."""
    logit_mean: float = 0.0
    """Mean of logit_normal, over logit(t / T); below 0: less noise, which LPL's gate passes more often."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    timestep_sampling: Literal["independent", "stratified"] = "independent"
    """stratified: each step's timesteps cover the distribution evenly, so each step, and each process in it, has nearly
    the same number of samples that pass LPL's gate."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(self.snr_gamma is None or self.snr_gamma > 0, f"--snr_gamma must be positive, not {self.snr_gamma}")
        require(0 <= self.noise_offset < float("inf"), f"--noise_offset must be 0 or more, not {self.noise_offset}")
        require(self.timestep_bias_multiplier >= 0, "--timestep_bias_multiplier must be 0 or more")
        require(0 < self.timestep_bias_portion <= 1, "--timestep_bias_portion must lie in 0..1")
        require(
            self.snr_gamma is None or self.loss_weighting == "none",
            f"--snr_gamma {self.snr_gamma} and --loss_weighting {self.loss_weighting} are two weightings: drop one",
        )
        require(0 <= self.p2_gamma < float("inf"), f"--p2_gamma must be 0 or more, not {self.p2_gamma}")
        require(0 < self.p2_k < float("inf"), f"--p2_k must be positive, not {self.p2_k}")
        require(0 < self.huber_c < float("inf"), f"--huber_c must be positive, not {self.huber_c}")
        require(
            self.huber_c <= 1 or self.huber_schedule == "constant" or self.loss_type == "mse",
            f"--huber_c {self.huber_c}: the threshold falls from 1 to it; give 1 or less, or --huber_schedule constant",
        )
        require(
            self.pyramid_noise_iterations >= 0 and self.pyramid_noise_iterations != 1,
            f"--pyramid_noise_iterations must be 0 or at least 2, not {self.pyramid_noise_iterations}: the first level "
            "is as fine as the noise itself",
        )
        require(
            0 < self.pyramid_noise_discount <= 1,
            f"--pyramid_noise_discount must lie above 0 and be 1 at most, not {self.pyramid_noise_discount}",
        )
        require(
            not (self.noise_offset and self.pyramid_noise_iterations),
            f"--noise_offset {self.noise_offset} and --pyramid_noise_iterations {self.pyramid_noise_iterations} both "
            "make coarse noise: drop one",
        )
        require(abs(self.logit_mean) < float("inf"), f"--logit_mean must be a number, not {self.logit_mean}")
        require(0 < self.logit_std < float("inf"), f"--logit_std must be positive, not {self.logit_std}")
        if self.timestep_bias_strategy == "range":
            require(
                0 <= self.timestep_bias_begin < self.timestep_bias_end,
                f"--timestep_bias_begin {self.timestep_bias_begin} must be 0 or more and lie below "
                f"--timestep_bias_end {self.timestep_bias_end}",
            )
