"""What is in a LoRA's file of diffusers' naming: its tensors, and what it says of its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lpl.config import ModelConfig
from lpl.families.files import read_header
from lpl.families.schedulers import PREDICTION, PREDICTIONS, RESCALED

ADAPTER = "lora_adapter_metadata"
"""diffusers' key of the adapter's peft configuration."""
TEXT_MODEL = "text_model."
"""How the names of a text encoder's modules begin in files."""


def text_module(name: str) -> str:
    """The name in files of a text encoder's module, which begins with text_model.

    transformers 5 has dropped that prefix for CLIP-L. ComfyUI and earlier versions know the layers by it only, and
    diffusers takes it away where it must.
    """
    return f"{TEXT_MODEL}{name.removeprefix(TEXT_MODEL)}"


def adapter_of(name: str, part: Any) -> dict[str, Tensor]:
    """An adapter's tensors under peft's names, those of text encoders as text_module has them."""
    tensors = get_peft_model_state_dict(part, save_embedding_layers=False)
    if not name.startswith("text_encoder"):
        return tensors
    return {text_module(key): value for key, value in tensors.items()}


def is_dora(file: Path) -> bool:
    """Whether a LoRA file has magnitudes."""
    return any("magnitude" in key or key.endswith(".dora_scale") for key in read_header(file) or {})


def fold_alpha(tensors: dict[str, Tensor], adapter: dict[str, Any], name: str) -> None:
    """Multiplies B by alpha / rank, and says that alpha is each layer's rank: W + (alpha / rank) B A stays what it is.

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
    """What a LoRA's files say of its model, under the keys of modelspec and of kohya's programs, which others show.

    Beside that the options that decide the schedule, as they were given: what a run only took from its model is the
    business of the model that the LoRA is merged into.
    """
    model = str(config.pretrained_model_name_or_path)
    name = Path(model).resolve().name if Path(model).exists() else model
    found = {
        "ss_sd_model_name": name if config.merged_lora is None else f"{name} + {Path(config.merged_lora).stem}",
        "ss_zero_terminal_snr": str(bool(scheduler.get("rescale_betas_zero_snr"))),
    }
    if (kind := scheduler.get("prediction_type", "epsilon")) in PREDICTIONS:
        found["modelspec.prediction_type"] = PREDICTIONS[kind]
    if config.prediction_type is not None:
        found[PREDICTION] = config.prediction_type
    return found | ({RESCALED: "True"} if config.rescale_betas_zero_snr else {})
