"""Which figures of an arm are measured with another yardstick than the baseline's, and by which options.

Validation measures LPL as the run itself defines it, and the diffusion loss against what the run's model predicts, both
on what the run holds out; samples are compared at the run's resolution. An arm that changes such an option changes the
figure's meaning, whatever it does to the model.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lpl.config import TrainConfig
from lpl.config.perceptual import acting

SAMPLES = "samples"
"""Kind of the figures of `lpl eval`."""

DISTANCE = {
    "lpl_num_blocks", "lpl_norm_type", "lpl_loss_type", "lpl_pow_law", "lpl_remove_outliers", "lpl_dtype",
    "lpl_t_threshold", "lpl_snr_threshold", "lpl_sigma_threshold",
}  # fmt: skip
"""Options that define the LPL that validation measures, and where: its scale by SNR, crop and random depth are not used
there (see training/held_out_loss.py)."""

UNSEEN = {
    "crop_variants", "random_flip", "caption_choice", "caption_variants", "proportion_empty_prompts", "repeats",
    "reg_data_dir", "prior_loss_weight", "max_bad_fraction", "latent_cache_dir", "rehash", "dataloader_num_workers",
}  # fmt: skip
"""Options of the data that what is held out, and how it is shown, does not depend on."""

SAME_VALUES = {"channel_detached": "channel"}
"""Norms that differ in their gradients alone."""


def other_yardsticks(config: TrainConfig, baseline: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The options by which figures of two runs have different definitions, by the kind of figure (see kind_of).

    Kinds without any are left out, and LPL where one of the runs has none to measure.
    """
    (told, own), (told_before, before) = ((c.flat(), _defining(c)) for c in (config, baseline))
    changed = {name for name in told if told[name] != told_before[name] and own.get(name) != before.get(name)}
    held_out = ({f.name for f in fields(config.data)} - UNSEEN) | {"rescale_betas_zero_snr"}
    kinds = {"diffusion_loss": held_out | {"prediction_type"}, SAMPLES: {"resolution"}}
    if config.lpl.use_lpl and baseline.lpl.use_lpl:
        kinds["lpl"] = held_out | DISTANCE
    found = {kind: tuple(sorted(changed & options)) for kind, options in kinds.items()}
    return {kind: options for kind, options in found.items() if options}


def kind_of(metric: str) -> str:
    """Of a metric's name: "diffusion_loss" or "lpl" for those of validation, else SAMPLES."""
    return metric.rsplit("/", 1)[1] if metric.startswith("validation/") else SAMPLES


def _defining(config: TrainConfig) -> dict[str, Any]:
    """All options, those that come to the same spelled alike."""
    found = acting(config.flat())
    if "lpl_norm_type" in found:
        found["lpl_norm_type"] = SAME_VALUES.get(found["lpl_norm_type"], found["lpl_norm_type"])
    return found
