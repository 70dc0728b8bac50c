"""Which options of loss, noise and timesteps cannot act in a run, or act in a way that surprises."""

from __future__ import annotations

import logging
import os

from lpl.config import TrainConfig

logger = logging.getLogger("lpl")


def objective_rules(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """(option, whether it can act in this run, what it needs)."""
    diffusion = config.diffusion
    p2, huber = diffusion.loss_weighting == "p2", diffusion.loss_type == "huber"
    run, processes = config.run, int(os.environ.get("WORLD_SIZE", "1"))
    several = run.train_batch_size * run.gradient_accumulation_steps * processes > 1
    normal = diffusion.timestep_distribution == "logit_normal"
    return [
        *((name, p2, "--loss_weighting p2") for name in ("p2_gamma", "p2_k")),
        *((name, huber, "--loss_type huber") for name in ("huber_c", "huber_schedule")),
        ("pyramid_noise_discount", diffusion.pyramid_noise_iterations > 0, "--pyramid_noise_iterations"),
        *((name, normal, "--timestep_distribution logit_normal") for name in ("logit_mean", "logit_std")),
        ("timestep_sampling", several, "more than one sample in a step"),
        *mask_rules(config),
    ]


def mask_rules(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """As objective_rules, for masks."""
    data = config.data
    files = data.masked_loss == "files"
    return [
        ("unmasked_weight", data.masked_loss != "none", "--masked_loss"),
        ("mask_dir", files and data.train_data_dir is not None, "--masked_loss files and --train_data_dir"),
        ("mask_column", files and data.dataset_name is not None, "--masked_loss files and --dataset_name"),
    ]


def warn_of_objective(config: TrainConfig) -> None:
    """Says once, by name, what a run does that its options do not show."""
    if not config.model.rescale_betas_zero_snr:
        return
    weighting = config.diffusion.loss_weighting
    if config.diffusion.snr_gamma is not None or weighting != "none":
        name = "--snr_gamma" if weighting == "none" else f"--loss_weighting {weighting}"
        logger.warning(
            "%s gives the last timestep of --rescale_betas_zero_snr, where SNR is 0, the weight 0: it is not learned",
            name,
        )
    if config.model.rank is not None:
        logger.warning(
            "--rescale_betas_zero_snr: a LoRA's file does not hold the schedule; sample with a scheduler that has "
            "rescale_betas_zero_snr and timestep_spacing trailing"
        )
