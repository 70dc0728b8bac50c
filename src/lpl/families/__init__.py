"""Model families. Names of models live in this package only; further families join here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lpl.config import ModelConfig
from lpl.families.sdxl_check import check_model, configs_for_plan, native_resolution

if TYPE_CHECKING:
    import torch

    from lpl.families.base import Blueprint
    from lpl.families.sdxl import SDXL


def load_family(
    config: ModelConfig, device: torch.device, weight_dtype: torch.dtype, encoders_only: bool = False
) -> SDXL:
    """Loads the model that the config names, with or without its denoiser; check_model has passed."""
    from lpl.families.sdxl import SDXL

    return SDXL(config, device, weight_dtype, encoders_only)


def blueprint(configs: dict[str, Any], max_token_length: int = 75) -> Blueprint:
    """The networks that a model's configs describe, for a plan with captions of so many tokens."""
    from lpl.families.sdxl_blueprint import SDXLBlueprint

    return SDXLBlueprint(configs, max_token_length)


def noise_scheduler(configs: dict[str, Any]) -> Any:
    """The training schedule that a model's configs state."""
    from lpl.families import sdxl

    return sdxl.training_schedule(configs["scheduler"])


def model_configs(config: ModelConfig) -> dict[str, Any]:
    """Checks the model and returns its components' configs; nothing heavy loads."""
    return check_model(config)


def plan_configs(config: ModelConfig) -> dict[str, Any]:
    """The configs of a model that need not be there: no weights are asked for, and SDXL's own configs are known."""
    return configs_for_plan(config)


__all__ = ["blueprint", "load_family", "model_configs", "native_resolution", "noise_scheduler", "plan_configs"]
