"""What a plan needs of an SDXL model: its networks and inputs of their shapes, from configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lpl.families.sdxl import SDXL, named, training_schedule
from lpl.families.sdxl_check import FLAG
from lpl.families.sdxl_lora import LORA_TARGETS, WITH_TEXT
from lpl.families.sdxl_text import TOKENS_PER_CHUNK, usual_layer
from lpl.families.sdxl_trainee import SDXLTrainee, token_fields


class SDXLBlueprint:
    """Builds networks with random weights; on the meta device they take no memory. See families.base.Blueprint.

    Args:
        configs: by component, as check_model returns them.
        max_token_length: of captions, see ModelConfig.
        trains_text: whether the text encoders are trained, and so part of the denoiser.
        clip_skip: see ModelConfig.
    """

    def __init__(
        self,
        configs: Mapping[str, Any],
        max_token_length: int = TOKENS_PER_CHUNK,
        trains_text: bool = False,
        clip_skip: int | None = None,
    ) -> None:
        self._configs = configs
        self.trains_text, self._layer = trains_text, usual_layer(clip_skip)
        self.lora_targets: Mapping[str, tuple[str, ...]] = WITH_TEXT if trains_text else LORA_TARGETS
        self._chunks = max_token_length // TOKENS_PER_CHUNK
        self.denoise = SDXL.denoise
        with named(FLAG, "its scheduler"):
            self.noise_scheduler = training_schedule(configs["scheduler"])
        self.latent_channels = int(configs["vae"].get("latent_channels", 4))
        self.stride = 2 ** (len(configs["vae"].get("block_out_channels", [64])) - 1)
        with named(FLAG, "its configs"):
            self._text_configs = [
                CLIPTextConfig.from_dict(configs[part]) for part in ("text_encoder", "text_encoder_2")
            ]

    def denoiser(self) -> Any:
        with named(FLAG, "the UNet of its configs"):
            unet = UNet2DConditionModel.from_config(self._configs["unet"])
        if not self.trains_text:
            return unet
        first, second = self.text_encoders()
        return SDXLTrainee(unet, first, second, self._layer, force_zeros=False)

    def vae(self) -> Any:
        with named(FLAG, "the VAE of its configs"):
            return AutoencoderKL.from_config(self._configs["vae"]).eval().requires_grad_(False)

    def text_encoders(self) -> list[nn.Module]:
        first, second = self._text_configs
        with named(FLAG, "the text encoders of its configs"):
            return [CLIPTextModel(first).eval(), CLIPTextModelWithProjection(second).eval()]

    def tokens(self, batch: int) -> Tensor:
        return torch.zeros(batch, self._text_configs[0].max_position_embeddings, dtype=torch.long)

    def text(self, batch: int) -> dict[str, Tensor]:
        if self.trains_text:
            ids = self.tokens(batch)[:, None].expand(-1, self._chunks, -1)
            return token_fields(ids, ids, [""] * batch)
        unet = self._configs["unet"]
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        length = self._chunks * self._text_configs[0].max_position_embeddings
        embeds = torch.zeros(batch, length, unet["cross_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": torch.zeros(batch, pooled)}
