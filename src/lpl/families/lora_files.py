"""The content of a LoRA file in diffusers' naming: its tensors, and metadata on its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lpl.config import ModelConfig
from lpl.families.files import read_header
from lpl.families.schedulers import FLOW, PREDICTION, PREDICTIONS, RESCALED

ADAPTER = "lora_adapter_metadata"
"""diffusers' key of the adapter's peft configuration."""
TEXT_MODEL = "text_model."
"""How the names of a text encoder's modules begin in files."""


def text_module(name: str) -> str:
    """The name of a text encoder's module in files, which begins with text_model.

    transformers 5 has dropped that prefix for CLIP-L. ComfyUI and earlier versions need it, and diffusers removes it
    where necessary.
    """
    return f"{TEXT_MODEL}{name.removeprefix(TEXT_MODEL)}"


def adapter_of(name: str, part: Any) -> dict[str, Tensor]:
    """An adapter's tensors under peft's names, those of text encoders named by text_module."""
    tensors = get_peft_model_state_dict(part, save_embedding_layers=False)
    if not name.startswith("text_encoder"):
        return tensors
    return {text_module(key): value for key, value in tensors.items()}


def is_dora(file: Path) -> bool:
    """Whether a LoRA file has magnitudes."""
    return any("magnitude" in key or key.endswith(".dora_scale") for key in read_header(file) or {})


def fold_alpha(tensors: dict[str, Tensor], adapter: dict[str, Any], name: str) -> None:
    """Multiplies B by alpha / rank, and sets alpha to each layer's rank: W + (alpha / rank) B A does not change.

    Args:
        adapter: peft's configuration, its keys behind the component's name and a dot.
    """
    rank, alpha = adapter[f"{name}.r"], adapter[f"{name}.lora_alpha"]
    for key in tensors:
        if ".lora_B." in key:
            tensors[key] = tensors[key] * (alpha / tensors[key].shape[1])
    adapter[f"{name}.lora_alpha"] = rank
    if adapter.get(f"{name}.rank_pattern"):
        adapter[f"{name}.alpha_pattern"] = adapter[f"{name}.rank_pattern"]


def lora_metadata(config: ModelConfig, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """Metadata on the model for a LoRA's files, under the keys of modelspec and kohya's programs, which others display.

    Also the schedule options, if they were given: a schedule that the run only took from its model is decided by the
    model that the LoRA is merged into. And where a UNet was trained by flow matching, that.
    """
    model = str(config.pretrained_model_name_or_path)
    name = Path(model).resolve().name if Path(model).exists() else model
    found = {
        "ss_sd_model_name": name if config.merged_lora is None else f"{name} + {Path(config.merged_lora).stem}",
        "ss_zero_terminal_snr": str(bool(scheduler.get("rescale_betas_zero_snr"))),
    }
    if (kind := scheduler.get("prediction_type", "epsilon")) in PREDICTIONS:
        found["modelspec.prediction_type"] = PREDICTIONS[kind]
    if config.prediction_type is not None or kind == FLOW:
        found[PREDICTION] = config.prediction_type or FLOW
    return found | ({RESCALED: "True"} if config.rescale_betas_zero_snr else {})
