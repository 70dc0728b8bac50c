"""Which options of loss, noise and timesteps act in a way that surprises."""

from __future__ import annotations

import logging

from lpl.config import TrainConfig

logger = logging.getLogger("lpl")


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
