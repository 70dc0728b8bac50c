"""Model families. Names of models live in this package only: families are declared in kinds.py."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpl.base.errors import UserError, require
from lpl.config import ModelConfig
from lpl.families.files import INDEX, SINGLE_FILES, beside, read_header, reader
from lpl.families.kind import Kind
from lpl.families.kinds import KINDS

if TYPE_CHECKING:
    import torch

    from lpl.diffusion.schedule import Schedule
    from lpl.families.base import Blueprint, Exported, Family
    from lpl.families.lora_names import Layer

RESULT_NAMES = (
    "model_index.json", "unet/", "transformer/", "vae/", "scheduler/", "text_encoder/", "text_encoder_#/", "tokenizer/",
    "tokenizer_#/", "image_encoder/", "feature_extractor/", "pytorch_lora_weights.safetensors",
)  # fmt: skip
"""Names of a run's result, a pipeline's or an adapter's: # stands for a number, / ends the name of a folder."""


def kind_of_class(name: Any) -> Kind | None:
    """The family of a pipeline's class, by the class's name."""
    return next((kind for kind in KINDS if isinstance(name, str) and name.startswith(kind.pipelines)), None)


def kind_of(config: ModelConfig) -> Kind:
    """The family of a model: by a single file's keys, its Hub id, or its model_index.json."""
    name = config.pretrained_model_name_or_path
    if name is None:
        return KINDS[0]
    if name.endswith(".safetensors"):
        header = read_header(Path(name)) or {}
        if (known := next((kind for kind in KINDS if kind.owns(header)), None)) is not None:
            return known
    if config.single_file_config is not None and Path(name).suffix in SINGLE_FILES:
        with beside(config) as others:
            return kind_of(others)
    path = Path(name)
    known = next((kind for kind in KINDS if kind.published_as(name) and not path.exists()), None)
    if known is None and not name.endswith(".safetensors"):
        with suppress(UserError):  # the checks of the first family report it
            known = kind_of_class(reader(path, name, config)(INDEX).get("_class_name"))
    return known or KINDS[0]


def model_configs(config: ModelConfig) -> dict[str, Any]:
    """See Kind.model_configs."""
    return kind_of(config).model_configs(config)


def plan_configs(config: ModelConfig) -> dict[str, Any]:
    """See Kind.plan_configs."""
    return kind_of(config).plan_configs(config)


def load_family(
    config: ModelConfig, device: torch.device, weight_dtype: torch.dtype, encoders_only: bool = False
) -> Family:
    """Loads the model that the config names, with or without its denoiser; model_configs has passed."""
    family: Family = kind_of(config).find("Model")(config, device, weight_dtype, encoders_only)
    return family


def blueprint(configs: dict[str, Any], config: ModelConfig | None = None) -> Blueprint:
    """The networks that a model's configs describe, for a plan with these options."""
    config = config or ModelConfig()
    plan: Blueprint = kind_of(config).find("Plan")(configs, config)
    return plan


def load_for_export(config: ModelConfig, dtype: torch.dtype | None, lora: Path | None, scale: float) -> Exported:
    """Loads a model to write it elsewhere, in a precision (None: as stored), with a LoRA merged into it."""
    model: Exported = kind_of(config).find("Export")(config, dtype, lora, scale)
    return model


def check_export(config: ModelConfig, single_file: bool, lora: Path | None) -> None:
    """Refuses a model or a LoRA that cannot be written as asked, before anything heavy loads."""
    kind_of(config).check_export(config, single_file, lora)


def as_trained(config: ModelConfig, lora: Path) -> ModelConfig:
    """A model's options with the schedule options of the run that trained this LoRA, if the file states any."""
    from lpl.families.schedulers import lora_options

    return replace(config, **lora_options(lora))


def kohya_lora(lora: Path, config: ModelConfig, title: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A LoRA file of diffusers' naming in kohya's, and its metadata; for a DoRA the model's weights are loaded."""
    from lpl.families.lora_files import is_dora

    kind = kind_of(config)
    require("to_kohya" in kind.parts, f"--to kohya: no names of a {kind.name} LoRA's layers are known but diffusers'")
    pipeline = load_for_export(config, None, None, 1.0).pipeline if is_dora(lora) else None

    def weight_of(part: str, module: str) -> torch.Tensor:
        weight: torch.Tensor = getattr(pipeline, part).get_submodule(module).weight
        return weight

    tensors, metadata = kind.find("to_kohya")(lora, plan_configs(config), title, weight_of)
    return tensors, metadata


def with_lora_weights(config: ModelConfig) -> ModelConfig:
    """A model's options with those that --lora_weights decides; refuses a file that does not fit them."""
    if config.lora_weights is None:
        return config
    if config.continued_lora is None:
        kind_of(config).lora_parts(Path(config.lora_weights), "--lora_weights")
        return config
    from lpl.families.lora_start import with_file

    return with_file(config, kind_of(config))


def lora_layers(config: ModelConfig, denoiser: Any) -> dict[str, Layer]:
    """The layers of --lora_weights, by the denoiser's modules, if its training continues; see lora_start.layers_of."""
    if config.continued_lora is None:
        return {}
    from lpl.families.lora_start import layers_of

    return layers_of(config, kind_of(config), denoiser)


def schedule_of_configs(configs: dict[str, Any]) -> Schedule:
    """The training schedule that a model's configs state."""
    from lpl.families.schedulers import training_schedule

    return training_schedule(configs["scheduler"])


__all__ = [
    "KINDS",
    "RESULT_NAMES",
    "Kind",
    "as_trained",
    "blueprint",
    "check_export",
    "kind_of",
    "kind_of_class",
    "kohya_lora",
    "load_family",
    "load_for_export",
    "lora_layers",
    "model_configs",
    "plan_configs",
    "schedule_of_configs",
    "with_lora_weights",
]
