"""An SDXL model for export, with a LoRA merged into it if given, also in the original layout for ComfyUI and A1111."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lpl.families import sdxl_names as names
from lpl.families.pipeline_export import PipelineExport
from lpl.families.schedulers import prediction_of
from lpl.families.sdxl_check import SDXL_KIND
from lpl.families.sdxl_configs import PUBLISHED

logger = logging.getLogger("lpl")


def original_tensors(pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a pipeline under its original name, sharing memory where it can.

    As in Stability's own files there are also CLIP-L's position_ids, and CLIP-G's logit_scale, which no program uses
    and diffusers drops: ln 100, its upper limit in training. A model of v-prediction has an empty v_pred, and an empty
    ztsnr where its schedule ends without signal: ComfyUI recognises it by these keys (supported_models.SDXL).

    Raises:
        UserError: a weight or a prediction type that the layout has no place for.
    """
    yield from unet_tensors(pipeline.unet)
    yield from vae_tensors(pipeline.vae)
    yield from clip_l_tensors(pipeline.text_encoder)
    yield from clip_g_tensors(pipeline.text_encoder_2)
    scheduler = pipeline.scheduler.config
    if prediction_of(scheduler) == "v":
        yield "v_pred", torch.zeros(0)
        if scheduler.get("rescale_betas_zero_snr"):
            yield "ztsnr", torch.zeros(0)


def modelspec(pipeline: Any, title: str, resolution: int, architecture: str = names.ARCHITECTURE) -> dict[str, str]:
    """Metadata by Stability AI's model specification 1.0.0, without the hash.

    Raises:
        UserError: see prediction_of.
    """
    return names.modelspec(title, architecture) | {
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": prediction_of(pipeline.scheduler.config),
    }


def unet_tensors(unet: Any) -> Iterator[tuple[str, Tensor]]:
    """A UNet's tensors under their original names."""
    for name, value in unet.state_dict().items():
        yield names.UNET + names.unet_module(name, unet.config), value


def vae_tensors(vae: Any) -> Iterator[tuple[str, Tensor]]:
    """A VAE's tensors under their original names."""
    for name, value in vae.state_dict().items():
        new = names.vae_weight(name, len(vae.config.up_block_types))
        yield names.VAE + new, value[:, :, None, None] if names.is_vae_projection(new) else value


def clip_l_tensors(encoder: Any, prefix: str = names.CLIP_L) -> Iterator[tuple[str, Tensor]]:
    """CLIP-L's tensors under the names of earlier versions of transformers."""
    for name, value in encoder.state_dict().items():
        plain = name.removeprefix("text_model.")
        if plain != "embeddings.position_ids":
            yield prefix + plain, value
    length = int(encoder.config.max_position_embeddings)
    yield f"{prefix}embeddings.position_ids", torch.arange(length)[None]


def clip_g_tensors(encoder: Any, prefix: str = names.CLIP_G) -> Iterator[tuple[str, Tensor]]:
    """CLIP-G's tensors under OpenCLIP's names; also for CLIP-H."""
    weights = encoder.state_dict()
    for name, value in weights.items():
        new = names.clip_g_weight(name)
        if new == "text_projection.weight":
            yield f"{prefix}text_projection", value.T  # x @ W there, W x in diffusers
        elif ".q_proj." in new:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield prefix + new.replace(".q_proj.", ".in_proj_"), torch.cat(parts)
        elif ".k_proj." not in new and ".v_proj." not in new and new != "embeddings.position_ids":
            yield prefix + new, value
    yield f"{prefix}logit_scale", torch.tensor(math.log(100), dtype=encoder.dtype)


def warn_of_scale(own: float, usual: float) -> None:
    """Warns that a single file cannot state the scale of its latents, where it is not the usual one."""
    if own != usual:
        logger.warning("programs for single files take a VAE's scaling_factor to be %g; this one's is %g", usual, own)


class SDXLExport(PipelineExport):
    """An SDXL model in memory, ready to be written, also in the original layout."""

    kind = SDXL_KIND

    def single_file(self, title: str) -> tuple[Any, dict[str, str]]:
        """Names and tensors of the original layout, and modelspec's metadata."""
        warn_of_scale(self.pipeline.vae.config.scaling_factor, PUBLISHED["vae"]["scaling_factor"])
        resolution = SDXL_KIND.native_resolution(self.configs)
        return original_tensors(self.pipeline), modelspec(self.pipeline, title, resolution)
