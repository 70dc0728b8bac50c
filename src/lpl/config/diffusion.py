"""Options: the diffusion loss, its noise and its timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lpl.config.checks import Needs, check_declared, option, require


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion objective: the loss that LPL is added to."""

    snr_gamma: float | None = option(None, above=0, elsewhere=("min_snr_gamma",))
    """Min-SNR weighting of the diffusion loss with this gamma (5 is usual)."""
    noise_offset: float = option(0.0, least=0, draws=True)
    """Scale of noise added per channel, the same for every pixel."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option("none", draws=True)
    """Which timesteps are drawn more often."""
    timestep_bias_multiplier: float = option(1.0, least=0, draws=True, needs="timestep_bias_strategy")
    """How much more often."""
    timestep_bias_portion: float = option(
        0.25, above=0, most=1, draws=True, needs="timestep_bias_strategy=earlier|later"
    )
    """Share of the schedule that `earlier` and `later` favour."""
    timestep_bias_begin: int = option(0, draws=True, needs="timestep_bias_strategy=range")
    """First timestep that `range` favours."""
    timestep_bias_end: int = option(1000, draws=True, needs="timestep_bias_strategy=range")
    """Timestep before which `range` ends."""
    loss_weighting: Literal["none", "debiased", "p2"] = option("none", elsewhere=("debiased_estimation_loss",))
    """Weight by noise level instead of --snr_gamma: debiased estimation (1/sqrt(SNR)) or P2 (1/(k + SNR)^gamma)."""
    p2_gamma: float = option(1.0, least=0, needs="loss_weighting=p2")
    """Strength of P2 weighting."""
    p2_k: float = option(1.0, above=0, needs="loss_weighting=p2")
    """Keeps P2's weight finite where there is all but no signal."""
    loss_type: Literal["mse", "huber"] = "mse"
    """Distance between output and target; huber: pseudo-Huber, which minds outliers less."""
    huber_c: float = option(0.1, above=0, needs="loss_type=huber")
    """Differences far above this count linearly, far below it squared; with a schedule, at the noisy end."""
    huber_schedule: Literal["constant", "exponential", "snr"] = option("snr", needs="loss_type=huber")
    """How the threshold falls from 1 at the first timestep to --huber_c at the last."""
    pyramid_noise_iterations: int = option(0, most=100, least=0, draws=True, elsewhere=("multires_noise_iterations",))
    """Levels of ever coarser noise that are added to the noise (6 to 10 are usual); 0: none."""
    pyramid_noise_discount: float = option(
        0.3, above=0, most=1, draws=True, needs="pyramid_noise_iterations", elsewhere=("multires_noise_discount",)
    )
    """Factor from one level to the next, coarser one."""
    timestep_distribution: Literal["uniform", "logit_normal"] = option("uniform", draws=True)
    """How timesteps are drawn; --timestep_bias_strategy multiplies it."""
    logit_mean: float = option(0.0, draws=True, needs="timestep_distribution=logit_normal")
    """Mean of logit_normal, over logit(t / T); below 0: less noise, which LPL's gate passes more often."""
    logit_std: float = option(1.0, above=0, draws=True, needs="timestep_distribution=logit_normal")
    """Standard deviation of logit_normal."""
    timestep_sampling: Literal["independent", "stratified"] = option(
        "independent",
        draws=True,
        needs=Needs("more than one sample in a step", lambda config: config.samples_a_step > 1),
    )
    """stratified: each step's timesteps cover the distribution evenly, so each step, and each process in it, has nearly
    the same number of samples that pass LPL's gate."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(
            self.snr_gamma is None or self.loss_weighting == "none",
            f"--snr_gamma {self.snr_gamma} and --loss_weighting {self.loss_weighting} are two weightings: drop one",
        )
        require(
            self.huber_c <= 1 or self.huber_schedule == "constant" or self.loss_type == "mse",
            f"--huber_c {self.huber_c}: the threshold falls from 1 to it; give 1 or less, or --huber_schedule constant",
        )
        require(
            self.pyramid_noise_iterations != 1,
            f"--pyramid_noise_iterations must be 0 or at least 2, not {self.pyramid_noise_iterations}: the first level "
            "is as fine as the noise itself",
        )
        require(
            not (self.noise_offset and self.pyramid_noise_iterations),
            f"--noise_offset {self.noise_offset} and --pyramid_noise_iterations {self.pyramid_noise_iterations} both "
            "make coarse noise: drop one",
        )
        if self.timestep_bias_strategy == "range":
            require(
                0 <= self.timestep_bias_begin < self.timestep_bias_end,
                f"--timestep_bias_begin {self.timestep_bias_begin} must be 0 or more and lie below "
                f"--timestep_bias_end {self.timestep_bias_end}",
            )
