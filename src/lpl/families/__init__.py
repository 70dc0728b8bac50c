"""Model families. Names of models live in this package only; further families join here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lpl.config import ModelConfig
from lpl.families.sdxl_check import check_model, native_resolution

if TYPE_CHECKING:
    import torch

    from lpl.families.sdxl import SDXL


def load_family(config: ModelConfig, device: torch.device, weight_dtype: torch.dtype) -> SDXL:
    """Loads the model that the config names; check_model has passed."""
    from lpl.families.sdxl import SDXL

    return SDXL(config, device, weight_dtype)


def meta_models(configs: dict[str, Any]) -> tuple[Any, Any, tuple[str, ...]]:
    """Denoiser and VAE without weights, on the meta device, and the layers of the denoiser that a LoRA is put on."""
    from lpl.families import sdxl

    return *sdxl.meta_models(configs), sdxl.LORA_TARGETS


def noise_scheduler(configs: dict[str, Any]) -> Any:
    """The training schedule that a model's configs state."""
    from lpl.families import sdxl

    return sdxl.training_schedule(configs["scheduler"])


def model_configs(config: ModelConfig) -> dict[str, Any]:
    """Checks the model and returns its components' configs; nothing heavy loads."""
    return check_model(config)


__all__ = ["load_family", "meta_models", "model_configs", "native_resolution", "noise_scheduler"]
