"""A model's noise schedule: what the model and the options say of it, and schedulers that are proved to do that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families.sdxl_file import FLAG, ZERO_SNR, file_schedule, warn

NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
)
"""What must be the same in every scheduler of a model; what else a config says is its own class's business."""


def chosen_schedule(scheduler: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A scheduler's config under what a single file says of itself, --prediction_type and --rescale_betas_zero_snr.

    The options go before the file, the file before the scheduler's config, which is that of --single_file_config.

    Zero terminal SNR: sqrt(alphas_cumprod) is shifted and scaled so that its last value is 0 and its first stays; then
    samplers must start at the last timestep (timestep_spacing trailing).

    Source: Lin et al., WACV 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (arXiv 2305.08891),
    algorithm 1, as diffusers' schedulers do it.

    Raises:
        UserError: zero terminal SNR with epsilon prediction, which says nothing of x0 in pure noise, or with a class of
            scheduler that cannot do it.
    """
    path = Path(str(config.pretrained_model_name_or_path))
    said = file_schedule(path, config) if path.suffix == ".safetensors" else {}
    own = scheduler.get("prediction_type", "epsilon")
    kind = said.get("prediction_type", own)
    if config.single_file_config is not None and config.prediction_type is None and kind != own:
        warn(f"{path} says {kind}, the scheduler of --single_file_config {own}: the file counts")
    chosen = {**scheduler, **said}
    if config.prediction_type is not None:
        chosen["prediction_type"] = config.prediction_type
    rescales = config.rescale_betas_zero_snr
    if not rescales and "rescale_betas_zero_snr" not in said:
        return chosen
    who = "--rescale_betas_zero_snr" if rescales else f"{FLAG} {path}: ztsnr in it"
    if chosen.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            f"{who}: the model predicts epsilon, which says nothing at a last timestep of pure "
            f"noise; use --prediction_type v_prediction{', or drop it' if rescales else ''}"
        )
    name = str(scheduler.get("_class_name", "EulerDiscreteScheduler"))
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or "rescale_betas_zero_snr" not in inspect.signature(cls.__init__).parameters:
        raise UserError(
            f"{who}: the model's scheduler is {name}, which does not know it; put an "
            "EulerDiscreteScheduler's scheduler_config.json in the model's folder, or drop it"
        )
    return chosen | ZERO_SNR


def build_scheduler(cls: Any, config: Mapping[str, Any], **changes: Any) -> Any:
    """A scheduler of a class, made of a scheduler's config and changes, of which nothing is lost.

    diffusers' `from_config` drops every key that its config names in `_use_default_values`, as those are that the
    config's file lacks, whatever they have been set to since. What the file lacks and is not changed is the business of
    the new class.

    Args:
        cls: of the new scheduler.
        config: of a scheduler of this class or another, or what its file says.
        changes: what is to differ.

    Raises:
        UserError: a config that the class cannot be made of, or that it does not follow in what it is compared by.
    """
    missing = set(config.get("_use_default_values", ())) - changes.keys()
    asked = {k: v for k, v in config.items() if k not in missing and k != "_use_default_values"} | changes
    try:
        built = cls.from_config(asked)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, ImportError) as error:
        raise UserError(
            f"the model's scheduler config makes no {cls.__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    known = inspect.signature(cls.__init__).parameters
    for key in dict.fromkeys((*changes, *NOISE)):
        if key in asked and not (asked[key] == built.config.get(key) if key in known else asked[key] in (None, False)):
            found = repr(built.config.get(key)) if key in known else "not known to it"
            raise UserError(
                f"the model's scheduler: {key} is to be {asked[key]!r}, but in a {cls.__name__} it is {found}; put an "
                "EulerDiscreteScheduler's scheduler_config.json in the model's folder"
            )
    return built


def set_schedule(pipeline: Any, config: ModelConfig) -> None:
    """Gives a pipeline the schedule that its model and the options say."""
    cls = type(pipeline.scheduler)
    own = {**pipeline.scheduler.config, "_class_name": cls.__name__}
    chosen = chosen_schedule(own, config)
    changes = {key: value for key, value in chosen.items() if own.get(key) != value}
    if changes:
        pipeline.scheduler = build_scheduler(cls, own, **changes)
