"""Options: the diffusion loss, its noise and its timesteps; the Latent Perceptual Loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lpl.base.errors import require
from lpl.config.checks import MOST_PIXELS, Needs, Options, option
from lpl.config.run import processes
from lpl.perceptual import defaults


@dataclass(frozen=True)
class DiffusionConfig(Options):
    """Diffusion objective: the loss that LPL is added to."""

    snr_gamma: float | None = option(None, above=0, elsewhere=("min_snr_gamma",))
    """Min-SNR weighting of the diffusion loss with this gamma (5 is usual)."""
    noise_offset: float = option(0.0, least=0, draws=True, elsewhere=("offset_noise",))
    """Scale of noise added per channel, the same for every pixel."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option(
        "none", draws=True, schedule="discrete"
    )
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
    loss_weighting: Literal["none", "debiased", "p2", "sigma_sqrt", "cosmap"] = option(
        "none",
        elsewhere=("debiased_estimation_loss", "weighting_scheme"),
        schedule={"debiased": "discrete", "p2": "discrete", "sigma_sqrt": "flow", "cosmap": "flow"},
    )
    """Weight by noise level instead of --snr_gamma: debiased estimation (1/sqrt(SNR)) or P2 (1/(k + SNR)^gamma); for
    flow matching sigma_sqrt (1/sigma^2) or cosmap (2/(pi (1 - 2 sigma + 2 sigma^2)))."""
    p2_gamma: float = option(1.0, least=0, needs="loss_weighting=p2")
    """Strength of P2 weighting."""
    p2_k: float = option(1.0, above=0, needs="loss_weighting=p2")
    """Keeps P2's weight finite where there is almost no signal."""
    loss_type: Literal["mse", "huber"] = "mse"
    """Distance between output and target; huber: pseudo-Huber, in which outliers weigh less."""
    huber_c: float = option(0.1, above=0, needs="loss_type=huber")
    """Threshold: differences far above it count linearly, far below it squared; with a schedule, at the noisy end."""
    huber_schedule: Literal["constant", "exponential", "snr"] = option("snr", needs="loss_type=huber")
    """How the threshold falls from 1 at the first timestep to --huber_c at the last."""
    pyramid_noise_iterations: int = option(0, most=100, least=0, draws=True, elsewhere=("multires_noise_iterations",))
    """Levels of ever coarser noise that are added to the noise (6 to 10 are usual); 0: none."""
    pyramid_noise_discount: float = option(
        0.3, above=0, most=1, draws=True, needs="pyramid_noise_iterations", elsewhere=("multires_noise_discount",)
    )
    """Factor from one level to the next, coarser one."""
    timestep_distribution: Literal["uniform", "logit_normal", "mode"] = option(
        "uniform", draws=True, schedule={"mode": "flow"}
    )
    """How timesteps are drawn; --timestep_bias_strategy multiplies it. mode, for flow matching: more in the middle."""
    logit_mean: float = option(0.0, draws=True, needs="timestep_distribution=logit_normal")
    """Mean of logit_normal, over logit(t / T); below 0: less noise, which LPL's gate passes more often."""
    logit_std: float = option(1.0, above=0, draws=True, needs="timestep_distribution=logit_normal")
    """Standard deviation of logit_normal."""
    mode_scale: float = option(1.29, least=-1, most=1.75, draws=True, needs="timestep_distribution=mode")
    """How much more often mode draws the middle."""
    timestep_shift: float | Literal["resolution"] | None = option(
        None,
        above=0,
        draws=True,
        schedule="flow",
        elsewhere=("flow_schedule_shift", "flow_schedule_auto_shift", "discrete_flow_shift", "training_shift"),
    )
    """Draw higher noise levels (above 1) or lower ones: s u / (1 + (s - 1) u) instead of each u drawn; resolution: by
    the number of latent cells, as Flux.1 does; unset: the model's own."""
    timestep_sampling: Literal["independent", "stratified"] = option(
        "independent",
        draws=True,
        needs=Needs("more than one sample in a step", lambda config: config.samples_per_step(processes()) > 1),
    )
    """stratified: each step's timesteps cover the distribution evenly, so each step, and each process in it, has nearly
    the same number of samples that pass LPL's gate."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


GATES = ("lpl_t_threshold", "lpl_snr_threshold", "lpl_sigma_threshold")
"""Options that set the gate: one at most is given."""


@dataclass(frozen=True)
class LPLConfig(Options):
    """Latent Perceptual Loss."""

    use_lpl: bool = option(True, main=True)
    """Off: the plain diffusion objective, bit for bit."""
    lpl_weight: float | Literal["auto"] = option("auto", least=0, main=True)
    """Weight against the diffusion loss; auto: set once from the measured gradient share."""
    lpl_target_share: float = option(defaults.TARGET_SHARE, above=0, below=1)
    """For auto: LPL's share of the gradient at the denoiser's output, r_lpl/(r_lpl + r_diffusion)."""
    lpl_reduction: Literal["expected", "gated"] = "expected"
    """Divide by batch size times gate probability, or (as the diffusers project does) by the samples that passed."""
    lpl_t_threshold: int | None = option(None, above=0, defines=("lpl",), replaced_by=GATES)
    """Apply where the timestep is below this."""
    lpl_snr_threshold: float | None = option(None, above=0, defines=("lpl",), replaced_by=GATES)
    """The gate as a signal-to-noise ratio: apply where SNR is at least this."""
    lpl_sigma_threshold: float | None = option(None, above=0, defines=("lpl",), main=True, replaced_by=GATES)
    """The gate as noise/signal: apply where it is at most this (the paper's tau; 3 to 6 did best there); 3 where no
    gate is given."""
    lpl_loss_type: Literal["mse", "l1"] = option("mse", defines=("lpl",))
    """Distance of normalised features."""
    lpl_norm_type: Literal["default", "shared", "batch", "channel", "channel_detached", "own"] = option(
        defaults.NORM_TYPE, defines=("lpl",)
    )
    """How features are normalised: own, each side by its own statistics of each channel (structure, not contrast);
    channel, both by the estimate's (asks for more contrast, as guidance does); weights do not carry over."""
    lpl_pow_law: bool = option(True, defines=("lpl",))
    """Halve a layer's weight each time its resolution doubles."""
    lpl_num_blocks: int = option(4, most=100, least=0, defines=("lpl",))
    """Up blocks compared after the middle block; the decoder is never run past the last one."""
    lpl_remove_outliers: bool = option(True, defines=("lpl",))
    """Leave decoder outliers (of the target's features, at strides 1 and 2) out of the distance."""
    lpl_scale: bool = True
    """Multiply each sample's LPL by min(1, g/SNR), g = --snr_gamma or 5."""
    lpl_start: int = option(0, least=0)
    """First optimizer step with LPL."""
    lpl_max_samples: int | None = option(None, least=1)
    """At most this many gated samples of a micro-batch go through the decoder; rescaled, so unbiased."""
    lpl_dtype: Literal["float32", "bfloat16", "float16", "auto"] = option("float32", defines=("lpl",))
    """Precision of the decoder in LPL; it never runs under autocast. auto: bfloat16 where its gradient, measured on the
    run's latents, is finite, near float32's and takes less time."""
    lpl_checkpointing: Literal["auto", "true", "false"] = option("auto", free=True)
    """Recompute the decoder in the backward pass to save memory; auto follows --gradient_checkpointing."""
    lpl_chunk: int | Literal["auto"] = option("auto", free=True, least=1)
    """Gated samples that go through the decoder at once; auto: as many as fill 256 x 256 pixels, at least one."""
    lpl_channels_last: Literal["auto", "true", "false"] = option("auto", free=True)
    """Memory layout of LPL's decoder; auto: channels last on a CPU, where it is faster."""
    lpl_compile: bool = option(False, free=True)
    """Fuse LPL's pointwise arithmetic with torch.compile; costs a minute at the start."""
    lpl_crop: int | None = option(None, most=MOST_PIXELS, least=8)
    """Compare a random window of this many pixels, cut after the middle block: an approximation, for large images."""
    lpl_random_depth: bool = False
    """Stop each step at a random depth of the decoder, terms divided by the chance of reaching them: unbiased, cheaper,
    noisier."""
    lpl_budget: float | None = option(
        None, above=0, main=True, preset_unless=("lpl_random_depth", "lpl_reduction=gated", "lpl_norm_type=batch")
    )
    """What LPL costs on average, as a share of a step without it (0.1: a tenth): which gated samples are decoded, and
    how deep, is drawn at random, and terms are divided by their chance: the same gradient on average, noisier. Unset:
    no limit."""
    lpl_warmup_steps: int = option(0, least=0)
    """Optimizer steps over which LPL's weight rises linearly, from --lpl_start on; auto measures without this ramp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.lpl_weight
        require(
            weight == "auto" or self.lpl_target_share == LPLConfig.lpl_target_share,
            "--lpl_target_share acts with --lpl_weight auto only: drop one of them",
        )
        gates = {f"--{name}": getattr(self, name) for name in GATES}
        given = [f"{name} {value}" for name, value in gates.items() if value is not None]
        require(len(given) <= 1, f"contradictory gates: {', '.join(given)}; give one")
        if self.lpl_budget is not None:
            require(not self.lpl_random_depth, "--lpl_budget draws depths of its own: drop --lpl_random_depth")
            require(
                self.lpl_reduction == "expected",
                "--lpl_budget needs --lpl_reduction expected: a mean over the decoded samples would be biased",
            )
            require(
                self.lpl_norm_type != "batch",
                "--lpl_norm_type batch has a scale that depends on which samples are decoded: drop --lpl_budget",
            )


def acting(options: Mapping[str, Any], default_gate: tuple[str, Any] | None = None) -> dict[str, Any]:
    """Options by name, without those of LPL that have no effect beside the others, and with the gate if none is given.

    Two sets with the same effect are equal then.

    Args:
        options: every option.
        default_gate: the gate if none is given; None: the present default.
    """
    if not options["use_lpl"]:
        return {name: value for name, value in options.items() if not name.startswith("lpl_")}
    found = dict(options)
    if all(found[name] is None for name in GATES):
        name, value = default_gate or ("lpl_sigma_threshold", defaults.SIGMA_THRESHOLD)
        found[name] = value
    if found["lpl_weight"] != "auto":
        del found["lpl_target_share"]
    return found
