"""Options: the Latent Perceptual Loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lpl.config.checks import MOST_PIXELS, check_declared, free, option, require
from lpl.perceptual import defaults

GATES = ("lpl_t_threshold", "lpl_snr_threshold", "lpl_sigma_threshold")
"""Statements of the gate: one at most."""
NormType = Literal["default", "shared", "batch", "channel", "channel_detached", "own"]


@dataclass(frozen=True)
class LPLConfig:
    """Latent Perceptual Loss."""

    use_lpl: bool = True
    """Off: the plain diffusion objective, bit for bit."""
    lpl_weight: float | Literal["auto"] = "auto"
    """Weight against the diffusion loss; auto: set once from the measured gradient share."""
    lpl_target_share: float = defaults.TARGET_SHARE
    """For auto: LPL's share of the gradient at the denoiser's output, r_lpl/(r_lpl + r_diffusion)."""
    lpl_reduction: Literal["expected", "gated"] = "expected"
    """Divide by batch size times gate probability, or (as the diffusers project does) by the samples that passed."""
    lpl_t_threshold: int | None = None
    """Apply where the timestep is below this."""
    lpl_snr_threshold: float | None = None
    """The gate as a signal-to-noise ratio: apply where SNR is at least this."""
    lpl_sigma_threshold: float | None = None
    """The gate as noise/signal: apply where it is at most this (the paper's tau; 3 to 6 did best there); 3 where no
    gate is given."""
    lpl_loss_type: Literal["mse", "l1"] = "mse"
    """Distance of normalised features."""
    lpl_norm_type: NormType = defaults.NORM_TYPE
    """How features are normalised; weights do not carry over between norms."""
    lpl_pow_law: bool = True
    """Halve a layer's weight each time its resolution doubles."""
    lpl_num_blocks: int = option(4, most=100)
    """Up blocks compared after the middle block; the decoder is never run past the last one."""
    lpl_remove_outliers: bool = True
    """Leave decoder outliers (of the target's features, at strides 1 and 2) out of the distance."""
    lpl_scale: bool = True
    """Multiply each sample's LPL by min(1, g/SNR), g = --snr_gamma or 5."""
    lpl_start: int = 0
    """First optimizer step with LPL."""
    lpl_max_samples: int | None = None
    """At most this many gated samples of a micro-batch go through the decoder; rescaled, so unbiased."""
    lpl_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the decoder in LPL; it never runs under autocast."""
    lpl_checkpointing: Literal["auto", "true", "false"] = free("auto")
    """Recompute the decoder in the backward pass to save memory; auto follows --gradient_checkpointing."""
    lpl_chunk: int | Literal["auto"] = free("auto")
    """Gated samples that go through the decoder at once; auto: as many as fill 256 x 256 pixels, at least one."""
    lpl_channels_last: Literal["auto", "true", "false"] = free("auto")
    """Memory layout of LPL's decoder; auto: channels last on a CPU, where it is faster."""
    lpl_compile: bool = free(False)
    """Fuse LPL's pointwise arithmetic with torch.compile; costs a minute at the start."""
    lpl_crop: int | None = option(None, most=MOST_PIXELS)
    """Compare a random window of this many pixels, cut after the middle block: an approximation, for large images."""
    lpl_random_depth: bool = False
    """Stop each step at a random depth of the decoder, terms divided by the chance of reaching them: unbiased, cheaper,
    noisier."""
    lpl_warmup_steps: int = 0
    """Optimizer steps over which LPL's weight rises linearly, from --lpl_start on; auto measures without this ramp."""

    def __post_init__(self) -> None:
        check_declared(self)
        weight = self.lpl_weight
        require(
            weight == "auto" or 0 <= float(weight) < math.inf,
            f"--lpl_weight must be 0 or more and finite, not {weight}",
        )
        require(
            0 < self.lpl_target_share < 1, f"--lpl_target_share must lie between 0 and 1, not {self.lpl_target_share}"
        )
        require(
            weight == "auto" or self.lpl_target_share == LPLConfig.lpl_target_share,
            "--lpl_target_share acts with --lpl_weight auto only: drop one of them",
        )
        gates = {f"--{name}": getattr(self, name) for name in GATES}
        given = [f"{name} {value}" for name, value in gates.items() if value is not None]
        require(len(given) <= 1, f"contradictory gates: {', '.join(given)}; give one")
        for name, value in gates.items():
            require(value is None or value > 0, f"{name} must be positive, not {value}: LPL would never apply")
        require(self.lpl_num_blocks >= 0, f"--lpl_num_blocks must be 0 or more, not {self.lpl_num_blocks}")
        require(self.lpl_start >= 0, f"--lpl_start must be 0 or more, not {self.lpl_start}")
        require(self.lpl_warmup_steps >= 0, f"--lpl_warmup_steps must be 0 or more, not {self.lpl_warmup_steps}")
        require(
            self.lpl_max_samples is None or self.lpl_max_samples >= 1,
            f"--lpl_max_samples must be at least 1, not {self.lpl_max_samples}",
        )
        require(
            self.lpl_chunk == "auto" or int(self.lpl_chunk) >= 1,
            f"--lpl_chunk must be auto or at least 1, not {self.lpl_chunk}",
        )
        require(self.lpl_crop is None or self.lpl_crop >= 8, f"--lpl_crop must be at least 8, not {self.lpl_crop}")


def acting(options: Mapping[str, Any], default_gate: tuple[str, Any] | None = None) -> dict[str, Any]:
    """Options by name without those of LPL that do nothing beside the others, and with the gate that they leave unsaid.

    Two sets that come to the same are equal then.

    Args:
        options: every option.
        default_gate: what no gate means; None: what it means now.
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
