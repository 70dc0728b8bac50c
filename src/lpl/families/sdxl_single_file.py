"""An SDXL pipeline as one file in the original layout: what ComfyUI, A1111 and from_single_file read."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lpl.errors import UserError
from lpl.families import sdxl_names as names

ARCHITECTURE = "stable-diffusion-xl-v1-base"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


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
    if kind not in PREDICTIONS:
        raise UserError(f"the model predicts {kind}, which a single file cannot say: use --to diffusers")
    return PREDICTIONS[kind]


def modelspec(pipeline: Any, title: str, resolution: int) -> dict[str, str]:
    """Metadata after Stability AI's model specification 1.0.0, but for the hash.

    Raises:
        UserError: see prediction_of.
    """
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": ARCHITECTURE,
        "implementation": IMPLEMENTATION,
        "title": title,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": f"{resolution}x{resolution}",
        "prediction_type": prediction_of(pipeline.scheduler.config),
    }
    return {f"modelspec.{key}": value for key, value in values.items()}


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
