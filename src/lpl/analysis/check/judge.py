"""What of a check's figures speaks against a run, and which option helps."""

from __future__ import annotations

import math
from typing import Any

from lpl.analysis.check import precision
from lpl.analysis.check.options import WALK_TOLERANCE
from lpl.config import TrainConfig
from lpl.perceptual.auto_weight import MEASURED_SAMPLES

LEAST_PSNR = 25.0
"""In dB; below, what the VAE loses is plainly seen."""
MOST_OUTLIERS = 0.1
"""Share of a layer's values; more is no few extreme activations."""


def faults_of(found: dict[str, Any]) -> list[str]:
    """Why no run should start; needs "components" and "walk_equals_decode"."""
    faults = [
        f"{name} is not finite in float32: its weights are damaged, take another model"
        for name, by_dtype in found["components"].items()
        if by_dtype["float32"]["finite"] is False
    ]
    walk = found["walk_equals_decode"]
    if not faults and not walk <= WALK_TOLERANCE:
        faults.append(
            f"LPL's walk through the decoder differs from vae.decode by {walk:.3g}: LPL would compare features of "
            "another image; take another VAE with --pretrained_vae_model_name_or_path, and report this one"
        )
    return faults


def warnings_of(found: dict[str, Any], config: TrainConfig, samples: int | None) -> list[str]:
    """What to look at before a run; sections that are missing say nothing.

    Args:
        found: check.json so far.
        config: the options.
        samples: images of the data, if known.
    """
    lines = precision.warnings_of(found["components"], str(config.run.mixed_precision), config.lpl.lpl_dtype)
    if "reconstruction" not in found:
        return lines
    psnr = found["reconstruction"]["psnr_mean"]
    if psnr < LEAST_PSNR:
        lines.append(
            f"the VAE gives images back with {psnr:.1f} dB: what it loses outweighs what LPL can sharpen; another VAE "
            "(--pretrained_vae_model_name_or_path) or a larger --resolution helps more"
        )
    for layer in found["layers"]:
        fractions = [row["outlier_fraction"] for row in layer["bins"]]
        most = max((value for value in fractions if math.isfinite(value)), default=0.0)
        if most > MOST_OUTLIERS:
            lines.append(
                f"{layer['tap']} has {most:.1%} of its values masked as outliers, which are meant to be few: look at "
                "its map, try --no_lpl_remove_outliers or a smaller --lpl_num_blocks"
            )
    lines += _gate_warnings(found, config, samples)
    return lines


def _gate_warnings(found: dict[str, Any], config: TrainConfig, samples: int | None) -> list[str]:
    lines: list[str] = []
    p_gate, gate, run = found["p_gate"], found["gate"], config.run
    if samples is None and run.max_train_steps is None:
        return lines
    drawn = run.train_batch_size * run.gradient_accumulation_steps * config.num_steps(samples or 1, 1)
    if config.lpl.lpl_weight == "auto" and p_gate * drawn < MEASURED_SAMPLES:
        lines.append(
            f"about {p_gate * drawn:.0f} of the run's {drawn:,} samples pass the gate {gate}, fewer than the "
            f"{MEASURED_SAMPLES} that --lpl_weight auto measures on: give the weight as a number, or train longer"
        )
    return lines
