"""Model families. Names of models live in this package only; further families join here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lpl.config import ModelConfig
from lpl.families.sdxl_check import model_configs, native_resolution, plan_configs

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lpl.diffusion.schedule import Schedule
    from lpl.families.base import Blueprint
    from lpl.families.sdxl import SDXL
    from lpl.families.sdxl_export import SDXLExport


RESULT_NAMES = (
    "model_index.json", "unet/", "transformer/", "vae/", "scheduler/", "text_encoder/", "text_encoder_#/", "tokenizer/",
    "tokenizer_#/", "image_encoder/", "feature_extractor/", "pytorch_lora_weights.safetensors",
)  # fmt: skip
"""What a pipeline or an adapter is written to: names of a run's result; # stands for a number, / ends a folder's."""


def load_family(
    config: ModelConfig, device: torch.device, weight_dtype: torch.dtype, encoders_only: bool = False
) -> SDXL:
    """Loads the model that the config names, with or without its denoiser; model_configs has passed."""
    from lpl.families.sdxl import SDXL

    return SDXL(config, device, weight_dtype, encoders_only)


def blueprint(configs: dict[str, Any], config: ModelConfig | None = None) -> Blueprint:
    """The networks that a model's configs describe, for a plan with these options."""
    from lpl.families.sdxl_networks import SDXLBlueprint

    config = config or ModelConfig()
    return SDXLBlueprint(configs, config.max_token_length, config.train_text_encoder, config.clip_skip)


def load_for_export(config: ModelConfig, dtype: torch.dtype | None, lora: Path | None, scale: float) -> SDXLExport:
    """Loads a model to write it elsewhere, in a precision (None: as stored), with a LoRA merged into it."""
    from lpl.families.sdxl_export import SDXLExport

    return SDXLExport(config, dtype, lora, scale)


def check_export(config: ModelConfig, single_file: bool, lora: Path | None) -> None:
    """Refuses a model or a LoRA that cannot be written as asked, before anything heavy loads."""
    from lpl.families.sdxl_export import check_lora, prediction_of, schedule_of

    model_configs(config)
    if single_file:
        prediction_of(schedule_of(config))
    if lora is not None:
        check_lora(config, lora)


def as_trained(config: ModelConfig, lora: Path) -> ModelConfig:
    """The options of a model with those of its schedule that a run was given that trained this LoRA, if it says any."""
    from lpl.families.sdxl_file import lora_options

    return replace(config, **lora_options(lora))


def kohya_lora(lora: Path, config: ModelConfig, title: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A LoRA file of diffusers' naming as kohya and ComfyUI name it, and its metadata."""
    from lpl.families.sdxl_names import to_kohya

    return to_kohya(lora, plan_configs(config), title)


def schedule_of_configs(configs: dict[str, Any]) -> Schedule:
    """The training schedule that a model's configs state."""
    from lpl.families.sdxl_file import training_schedule

    return training_schedule(configs["scheduler"])


__all__ = [
    "RESULT_NAMES",
    "as_trained",
    "blueprint",
    "check_export",
    "kohya_lora",
    "load_family",
    "load_for_export",
    "model_configs",
    "native_resolution",
    "plan_configs",
    "schedule_of_configs",
]
