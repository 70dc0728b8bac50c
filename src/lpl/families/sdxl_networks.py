"""SDXL's networks: denoiser and text encoders as one module, for training them together, and all of them for a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpl.config import ModelConfig
from lpl.families.joint import JointModel, body_of
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.schedulers import unet_time
from lpl.families.sdxl_check import SDXL_KIND
from lpl.families.sdxl_names import LORA_TARGETS, WITH_TEXT
from lpl.families.sdxl_text import TOKENS_PER_CHUNK, embed, usual_layer


class SDXLJointModel(JointModel):
    """The UNet with both text encoders before it.

    CLIP-L's last layers and its last norm have no effect, since the UNet sees the hidden states before them. All layers
    of CLIP-G have one, through the pooled embedding.

    Args:
        layer: index of the hidden states that are used, see PromptEncoder.
        force_zeros: whether an empty caption is zeros instead of its encoding.
    """

    unet: Any
    text_encoder: Any
    text_encoder_2: Any

    def __init__(self, unet: Any, text_encoder: Any, text_encoder_2: Any, layer: int, force_zeros: bool) -> None:
        used = len(body_of(text_encoder).encoder.layers) + 1 + layer
        parts = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        super().__init__(parts, {"text_encoder": used})
        self.layer, self.force_zeros = layer, force_zeros

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], sizes: Tensor) -> Tensor:
        """The UNet's output, (B, C, h, w), for captions as `token_fields` gives them."""
        embeds, pooled = self.encode(text)
        return _run_unet(self.unet, noisy_latents, timesteps, embeds, pooled, sizes)

    def encode(self, text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, chunks * length, C) and pooled embedding (B, P), with gradient."""
        ids, ids_2 = text["input_ids"].long(), text["input_ids_2"].long()
        embeds, pooled = embed(self.text_encoder, self.text_encoder_2, ids, ids_2, self.layer)
        if self.force_zeros:
            keep = text["is_empty"] == 0
            embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        return embeds, pooled

    def idle(self) -> Iterator[nn.Parameter]:
        yield from body_of(self.text_encoder).final_layer_norm.parameters()
        yield from super().idle()


def token_fields(ids: Tensor, ids_2: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Fields to encode captions from in a training step: token ids (B, chunks, length), and which are empty."""
    is_empty = torch.tensor([caption == "" for caption in captions])
    return {"input_ids": ids.int(), "input_ids_2": ids_2.int(), "is_empty": is_empty.int()}


def _run_unet(
    unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor, sizes: Tensor
) -> Tensor:
    dtype = noisy_latents.dtype
    conditions = {"text_embeds": pooled.to(dtype), "time_ids": sizes.to(dtype)}
    return unet(noisy_latents, timesteps, embeds.to(dtype), added_cond_kwargs=conditions, return_dict=False)[0]


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise."""
    timesteps = unet_time(levels)
    if "input_ids" in text:
        return denoiser(noisy_latents, timesteps, text, extra["sizes"])
    return _run_unet(denoiser, noisy_latents, timesteps, text["prompt_embeds"], text["pooled"], extra["sizes"])


class SDXLBlueprint(PipelineBlueprint):
    """SDXL's networks with random weights."""

    kind = SDXL_KIND
    text_classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    denoise = staticmethod(denoise)

    def __init__(self, configs: Mapping[str, Any], config: ModelConfig) -> None:
        super().__init__(configs, config)
        self.trains_text, self._layer = config.train_text_encoder, usual_layer(config.clip_skip)
        self.lora_targets = WITH_TEXT if self.trains_text else LORA_TARGETS
        self._chunks = config.max_token_length // TOKENS_PER_CHUNK

    def denoiser(self) -> Any:
        unet = super().denoiser()
        if not self.trains_text:
            return unet
        first, second = self.text_encoders()
        return SDXLJointModel(unet, first, second, self._layer, force_zeros=False)

    def tokens(self, batch: int) -> list[Tensor]:
        return 2 * [torch.zeros(batch, self.text_configs[0].max_position_embeddings, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        if self.trains_text:
            ids = self.tokens(batch)[0][:, None].expand(-1, self._chunks, -1)
            return token_fields(ids, ids, [""] * batch)
        unet = self.configs["unet"]
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        length = self._chunks * self.text_configs[0].max_position_embeddings
        embeds = torch.zeros(batch, length, unet["cross_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": torch.zeros(batch, pooled)}
