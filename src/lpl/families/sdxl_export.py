"""Loads an SDXL model for export, merges a LoRA into it, and writes it in either layout."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from lpl.config import ModelConfig
from lpl.errors import UserError
from lpl.families.sdxl import load_pipeline, named
from lpl.families.sdxl_check import WITH_WEIGHTS, check_model, native_resolution
from lpl.families.sdxl_configs import PUBLISHED
from lpl.families.sdxl_file import compare_lora
from lpl.families.sdxl_schedule import chosen_schedule
from lpl.families.sdxl_single_file import modelspec, original_tensors, prediction_of

logger = logging.getLogger("lpl")

STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
LORA_PARTS = {
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
"""How the names of a LoRA's tensors begin, for each component it changes: diffusers' way and kohya's."""


class SDXLExport:
    """An SDXL model in memory, ready to be written.

    A LoRA is merged in float32 by peft, W + scale * (alpha / rank) B A, or for DoRA m times that divided by the norm of
    its rows; only then is the result rounded to the precision it is written in.

    Args:
        config: which model; its prediction_type and rescale_betas_zero_snr, if given, are what the result says.
        dtype: precision of the result; None: as each component's files have it, a model on the Hub float32.
        lora: a LoRA file of diffusers' or kohya's, or None.
        scale: of the LoRA.

    Raises:
        UserError: a model or LoRA that cannot be loaded whole.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None, lora: Path | None, scale: float) -> None:
        self.configs = check_model(config)
        found = {part: dtype or stored_dtype(config, part) for part in WITH_WEIGHTS}
        merged = [] if lora is None else lora_parts(lora)
        self.pipeline = load_pipeline(config, dtypes=found | dict.fromkeys(merged, torch.float32))
        if lora is not None:
            _merge(self.pipeline, lora, scale, merged)
        for part in WITH_WEIGHTS:
            for parameter in getattr(self.pipeline, part).parameters():
                parameter.data = parameter.data.to(found[part])

    def single_file(self, title: str) -> tuple[Any, dict[str, str]]:
        """Names and tensors of the original layout, and modelspec's metadata."""
        usual, own = PUBLISHED["vae"]["scaling_factor"], self.pipeline.vae.config.scaling_factor
        if own != usual:
            logger.warning(
                "programs for single files take a VAE's scaling_factor to be %g; this one's is %g", usual, own
            )
        resolution = native_resolution(self.configs)
        return original_tensors(self.pipeline), modelspec(self.pipeline, title, resolution)

    def save_folder(self, folder: Path) -> None:
        """Writes a pipeline in diffusers' format."""
        self.pipeline.save_pretrained(folder, safe_serialization=True)


def check_single_file(config: ModelConfig) -> None:
    """Refuses, before anything heavy loads, what a single file cannot say.

    Raises:
        UserError: no such model, or a prediction type that programs for single files do not know.
    """
    prediction_of(schedule_of(config))


def schedule_of(config: ModelConfig) -> dict[str, Any]:
    """The scheduler's config of a model that is checked, by its files and the options; nothing loads."""
    known: dict[str, Any] = check_model(config).get("scheduler") or chosen_schedule(PUBLISHED["scheduler"], config)
    return known


def stored_dtype(config: ModelConfig, part: str) -> torch.dtype:
    """The precision that most values of a component have in its files: float16, bfloat16 or else float32."""
    name, variant = Path(str(config.pretrained_model_name_or_path)), config.variant
    if part == "vae" and config.pretrained_vae_model_name_or_path is not None:
        files = list(Path(config.pretrained_vae_model_name_or_path).glob("*.safetensors"))
    elif name.suffix == ".safetensors":
        files = [name]
    else:
        found = (name / part).glob("*.safetensors")
        files = [f for f in found if (f".{variant}" in f.name if variant else f.name.count(".") == 1)]
    sizes: Counter[str] = Counter()
    for file in files:
        with named("--base", str(file)), safe_open(file, "pt") as content:
            for key in content.keys():  # noqa: SIM118 (it is no dict)
                entry = content.get_slice(key)
                sizes[entry.get_dtype()] += torch.Size(entry.get_shape()).numel()
    return STORED.get(max(sizes, key=lambda kind: sizes[kind]) if sizes else "F32", torch.float32)


def check_lora(config: ModelConfig, lora: Path) -> None:
    """Refuses a LoRA that is none of SDXL's, and says so where it was trained to predict another thing than the model.

    Raises:
        UserError: see lora_parts.
    """
    lora_parts(lora)
    compare_lora(lora, schedule_of(config))


def lora_parts(file: Path) -> list[str]:
    """The components that a LoRA file changes.

    Raises:
        UserError: no safetensors file, or tensors that belong to none of SDXL's components.
    """
    keys = _keys(file)
    parts = [part for part, starts in LORA_PARTS.items() if any(key.startswith(starts) for key in keys)]
    known = tuple(start for part in parts for start in LORA_PARTS[part])
    strange = [key for key in keys if not key.startswith(known)] if parts else keys
    if strange or not keys:
        found = f"{strange[0]}" if strange else "nothing"
        raise UserError(
            f"--lora {file}: holds {found}, which is no part of an SDXL LoRA of diffusers' or kohya's naming"
        )
    return parts


def _keys(lora: Path) -> list[str]:
    try:
        with safe_open(lora, "pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"--lora {lora}: cannot be read as safetensors ({' '.join(str(error).split())})") from error


def _merge(pipeline: StableDiffusionXLPipeline, lora: Path, scale: float, parts: list[str]) -> None:
    expected = sum(not key.endswith(".alpha") for key in _keys(lora))
    with named("--lora", str(lora)):
        pipeline.load_lora_weights(str(lora.parent.resolve()), weight_name=lora.name, local_files_only=True)
    arrived = sum("lora_" in name for part in parts for name, _ in getattr(pipeline, part).named_parameters())
    if arrived != expected:
        raise UserError(
            f"--lora {lora}: of its {expected} tensors diffusers loads {arrived} into this model, so the result would "
            "not be the LoRA's: is it of another kind of model or of a newer format?"
        )
    with named("--lora", str(lora)):
        pipeline.fuse_lora(components=parts, lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()
