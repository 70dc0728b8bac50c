"""An SDXL model for export: with a LoRA merged into it, and in the original layout, which ComfyUI and A1111 read."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpl.base.errors import UserError, on_one_line
from lpl.config import ModelConfig
from lpl.families import sdxl_names as names
from lpl.families.sdxl import load_pipeline
from lpl.families.sdxl_check import WITH_WEIGHTS, model_configs, native_resolution
from lpl.families.sdxl_configs import PUBLISHED
from lpl.families.sdxl_file import chosen_schedule, compare_lora
from lpl.families.sdxl_networks import named

logger = logging.getLogger("lpl")


def original_tensors(pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a pipeline under its original name, sharing memory where it can.

    As in Stability's own files there are also CLIP-L's position_ids, and CLIP-G's logit_scale, which no program uses
    and diffusers does not keep: ln 100, the bound of its training. A model of v-prediction has an empty v_pred, and an
    empty ztsnr where its schedule ends without signal: by these keys ComfyUI knows it (supported_models.SDXL).

    Raises:
        UserError: a weight or a prediction type that the layout has no place for.
    """
    yield from _unet(pipeline.unet)
    yield from _vae(pipeline.vae)
    yield from _clip_l(pipeline.text_encoder)
    yield from _clip_g(pipeline.text_encoder_2)
    scheduler = pipeline.scheduler.config
    if prediction_of(scheduler) == "v":
        yield "v_pred", torch.zeros(0)
        if scheduler.get("rescale_betas_zero_snr"):
            yield "ztsnr", torch.zeros(0)


def prediction_of(scheduler: Any) -> str:
    """modelspec's word for what a model with this schedule predicts.

    Raises:
        UserError: something that programs for single files do not know.
    """
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in names.PREDICTIONS:
        raise UserError(f"the model predicts {kind}, which a single file cannot say: use --to diffusers")
    return names.PREDICTIONS[kind]


def modelspec(pipeline: Any, title: str, resolution: int) -> dict[str, str]:
    """Metadata after Stability AI's model specification 1.0.0, but for the hash.

    Raises:
        UserError: see prediction_of.
    """
    return names.modelspec(title, names.ARCHITECTURE) | {
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": prediction_of(pipeline.scheduler.config),
    }


def _unet(unet: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in unet.state_dict().items():
        yield names.UNET + names.unet_module(name, unet.config), value


def _vae(vae: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in vae.state_dict().items():
        new = names.vae_weight(name, len(vae.config.up_block_types))
        yield names.VAE + new, value[:, :, None, None] if names.is_vae_projection(new) else value


def _clip_l(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in encoder.state_dict().items():
        plain = name.removeprefix("text_model.")
        if plain != "embeddings.position_ids":
            yield names.CLIP_L + plain, value
    length = int(encoder.config.max_position_embeddings)
    yield f"{names.CLIP_L}embeddings.position_ids", torch.arange(length)[None]


def _clip_g(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    weights = encoder.state_dict()
    for name, value in weights.items():
        new = names.clip_g_weight(name)
        if new == "text_projection.weight":
            yield f"{names.CLIP_G}text_projection", value.T  # x @ W there, W x in diffusers
        elif ".q_proj." in new:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield names.CLIP_G + new.replace(".q_proj.", ".in_proj_"), torch.cat(parts)
        elif ".k_proj." not in new and ".v_proj." not in new and new != "embeddings.position_ids":
            yield names.CLIP_G + new, value
    yield f"{names.CLIP_G}logit_scale", torch.tensor(math.log(100), dtype=encoder.dtype)


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

    Raises:
        UserError: a model or LoRA that cannot be loaded whole.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None, lora: Path | None, scale: float) -> None:
        self.configs = model_configs(config)
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


def schedule_of(config: ModelConfig) -> dict[str, Any]:
    """The scheduler's config of a model that is checked, by its files and the options; nothing loads."""
    known: dict[str, Any] = model_configs(config).get("scheduler") or chosen_schedule(PUBLISHED["scheduler"], config)
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
        raise UserError(f"--lora {lora}: cannot be read as safetensors ({on_one_line(error)})") from error


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
