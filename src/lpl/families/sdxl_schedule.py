"""What the options make of a model's noise schedule; JSON only, unless they ask for another one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lpl.config import ModelConfig
from lpl.errors import UserError

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def chosen_schedule(scheduler: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A scheduler's config under --prediction_type and --rescale_betas_zero_snr.

    Zero terminal SNR: sqrt(alphas_cumprod) is shifted and scaled so that its last value is 0 and its first stays; then
    samplers must start at the last timestep (timestep_spacing trailing).

    Source: Lin et al., WACV 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (arXiv 2305.08891),
    algorithm 1, as diffusers' schedulers do it.

    Raises:
        UserError: zero terminal SNR with epsilon prediction, which says nothing of x0 in pure noise, or with a class of
            scheduler that cannot do it.
    """
    chosen = dict(scheduler)
    if config.prediction_type is not None:
        chosen["prediction_type"] = config.prediction_type
    if not config.rescale_betas_zero_snr:
        return chosen
    prediction_type = chosen.get("prediction_type", "epsilon")
    if prediction_type == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr: the model predicts epsilon, which says nothing at a last timestep of pure "
            "noise; use --prediction_type v_prediction, or drop it"
        )
    name = str(scheduler.get("_class_name", "EulerDiscreteScheduler"))
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or "rescale_betas_zero_snr" not in inspect.signature(cls.__init__).parameters:
        raise UserError(
            f"--rescale_betas_zero_snr: the model's scheduler is {name}, which does not know it; put an "
            "EulerDiscreteScheduler's scheduler_config.json in the model's folder, or drop it"
        )
    return chosen | ZERO_SNR
