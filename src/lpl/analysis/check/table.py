"""A check as text for the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from lpl.analysis.check import precision
from lpl.analysis.check.suggest import INFORMED
from lpl.analysis.needs import readable
from lpl.base.terminal import INDENT, labelled, percent
from lpl.config import TrainConfig
from lpl.config.length import count
from lpl.perceptual.auto_weight import MEASURED_SAMPLES
from lpl.perceptual.defaults import HIGH_SHARE, LOW_SHARE, WALK_TOLERANCE

LEAST_PSNR = 25.0
"""In dB; below it, the VAE's losses are clearly visible."""
MOST_OUTLIERS = 0.1
"""Share of a layer's values; more are not just a few extreme activations."""


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
    """What to look at before a run, from check.json so far; `samples`: number of images in the data, if known."""
    lines = precision.warnings_of(found["components"], str(config.run.mixed_precision), config.lpl.lpl_dtype)
    if "reconstruction" not in found:
        return lines
    psnr = found["reconstruction"]["psnr_mean"]
    if psnr < LEAST_PSNR:
        lines.append(
            f"the VAE reconstructs images at {psnr:.1f} dB: what it loses outweighs what LPL can sharpen; another VAE "
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
    run = config.run
    if config.lpl.lpl_weight == "auto" and not (samples is None and run.max_train_steps is None):
        drawn = config.samples_per_step(1) * config.num_steps(samples or 1, 1)
        passing = found["p_gate"] * drawn
        if passing < MEASURED_SAMPLES:
            lines.append(
                f"about {passing:.0f} of the run's {drawn:,} samples pass the gate {found['gate']}, fewer than the "
                f"{MEASURED_SAMPLES} that --lpl_weight auto measures on: give the weight as a number, or train longer"
            )
    return lines


LEAST_GATED = 0.05
"""Least probability of passing the gate."""


def verdict_of(found: dict[str, Any], config: TrainConfig) -> tuple[str, str]:
    """The outcome of a run, acts, idles or harms, and a sentence; with faults the first of them is the reason."""
    if found["faults"]:
        return _harms(found["faults"][0])
    lpl, gate, p_gate, own = config.lpl, found["gate"], found["p_gate"], found["suggestion"]["own_gate"]
    cosine, share = own["cosine"], found["suggestion"]["own_share"]
    if own["gradient"] == "not finite":
        narrow = lpl.lpl_dtype != "float32"
        better = "keep --lpl_dtype float32" if narrow else "take another --pretrained_vae_model_name_or_path"
        return _harms(f"it is not finite with --lpl_dtype {lpl.lpl_dtype} within the gate ({gate}); {better}")
    if lpl.lpl_weight == 0:
        return _idles("--lpl_weight is 0; give auto, or a number above 0")
    if p_gate < LEAST_GATED or own["gradient"] == "none":
        return _idles(
            f"{percent(p_gate)} of the samples pass the gate ({gate}); give a wider one, such as "
            "--lpl_sigma_threshold 3, or draw less noise (--timestep_bias_strategy earlier)"
        )
    if own["gradient"] == "zero":
        return _idles(
            f"its gradient is exactly 0 for all that passes the gate ({gate}), which would stop the run; compare other "
            "layers (--lpl_num_blocks), or look at the masks"
        )
    least = found["suggestion"]["uninformed"]
    if least is not None and least["interval"][0] > INFORMED:
        return _harms(
            f"even where noise is least the model's distance to the picture is {least['share']:.2f} of that of an "
            "estimate that knows nothing of it; check that model, VAE and --prediction_type belong together"
        )
    if own["cosine_interval"] is not None and own["cosine_interval"][1] < 0:
        narrower = found["suggestion"]["lpl_t_threshold"]
        change = "drop LPL here (--no_use_lpl)" if narrower is None else f"give --lpl_t_threshold {narrower}"
        return _harms(f"it pulls against the diffusion loss within the gate ({gate}): cosine {cosine:.2f}; {change}")
    auto = lpl.lpl_weight == "auto"
    share = lpl.lpl_target_share if auto else share
    weight = own["lpl_weight"] if auto else float(lpl.lpl_weight)
    flag = "--lpl_target_share" if auto else "--lpl_weight"
    has = f"{flag} {lpl.lpl_target_share if auto else lpl.lpl_weight} gives it {percent(share)} of the gradient"
    if share < LOW_SHARE:
        return _idles(f"{has}; raise it" + ("" if auto else ", or use auto"))
    if share > HIGH_SHARE:
        return _harms(f"{has}; lower it" + ("" if auto else ", or use auto"))
    direction = "neither follows the diffusion loss nor opposes it, as far as can be told"
    if own["cosine_interval"] is not None and own["cosine_interval"][0] > 0:
        direction = "pulls the same way as the diffusion loss"
    return "acts", (
        f"LPL will act: it gets {percent(share)} of the gradient on {percent(p_gate)} of the samples, "
        f"with a weight of {'about ' if auto else ''}{weight:.3g}, and {direction} (cosine {cosine:.2f}); nothing "
        "needs to be changed"
    )


def _idles(why: str) -> tuple[str, str]:
    return "idles", f"LPL will idle: {why}"


def _harms(why: str) -> tuple[str, str]:
    return "harms", f"LPL will likely harm: {why}"


WIDTH = 118


def table(found: dict[str, Any]) -> str:
    """The verdict of check.json, a step's cost and what to do; the page has the measurements behind them."""
    lines = _labelled("verdict", [found["verdict"]])
    lines += _labelled("images", [f"{found['num_images']} on {found['device']}, {found['seconds']:.0f} s"])
    if "reconstruction" in found:
        own = found["reconstruction"]
        lines += _labelled("VAE", [f"PSNR {own['psnr_mean']:.1f} dB, worst {own['psnr_min']:.1f} dB: {own['file']}"])
        lines += _step(found["step"])
        lines += _labelled("suggestion", found["suggestion"]["why"])
    for label, key in (("warnings", "warnings"), ("faults", "faults"), ("left out", "refused")):
        lines += _labelled(label, found[key])
    return "\n".join(line.rstrip() for line in lines)


def _step(step: dict[str, Any]) -> list[str]:
    memory, flops = readable(step["peak_bytes"]), f"{step['flops'] / 1e12:.3g} TFLOP"
    lines = [f"{count(step['samples'], 'sample')}: about {memory} at its peak ({step['phase']}), {flops}"]
    if step["seconds"] is not None:
        plain = step["seconds_without_lpl"]
        lines.append(
            f"{step['seconds']:.3g} s forward and backward, {plain:.3g} s of them without LPL, which takes "
            f"{step['lpl_seconds_per_sample']:.3g} s for each of {step['lpl_samples']:.3g} samples on average"
        )
    return _labelled("step", lines)


def _labelled(label: str, texts: Sequence[str]) -> list[str]:
    wrapper = textwrap.TextWrapper(
        WIDTH - INDENT, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return labelled(label, [line for text in texts for line in wrapper.wrap(text)])
