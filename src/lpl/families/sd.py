"""Stable Diffusion 1 and 2, of epsilon and v-prediction: SDXL without sizes, with one text encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lpl.config import ModelConfig
from lpl.families.base import config_settings, tokenizer_settings, weights_hash
from lpl.families.kinds import SD_KIND
from lpl.families.loading import load_whole
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.pipeline_family import PipelineFamily, logger
from lpl.families.sdxl_names import LORA_TARGETS

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "skip_prk_steps": True,
    },
}
"""Configs of stable-diffusion-v1-5, as published; what is left out is the class's default."""


def load(config: ModelConfig, encoders_only: bool = False, dtypes: Mapping[str, torch.dtype] | None = None) -> Any:
    """See PipelineFamily.load; without the safety checker, which paints images black."""
    parts = {"safety_checker": None, "requires_safety_checker": False}
    return load_whole(StableDiffusionPipeline, SD_KIND, config, encoders_only, dtypes, **parts)


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise."""
    output: Tensor = denoiser(noisy_latents, levels, text["prompt_embeds"].to(noisy_latents.dtype), return_dict=False)[
        0
    ]
    return output


class Model(PipelineFamily):
    """A StableDiffusionPipeline taken apart for training; a caption of "" is what the pipeline uses for none."""

    kind = SD_KIND
    steps, guidance = SD_KIND.steps, SD_KIND.guidance
    lora_targets = LORA_TARGETS
    load = staticmethod(load)
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        (encoder,) = self.text_encoders
        encoder.float().eval().requires_grad_(False)
        tokenizer = self.pipeline.tokenizer
        # It would say of every long caption that it cannot be encoded: it is cut, which is said once.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        settings = json.dumps([config_settings(encoder.config.to_dict()), tokenizer_settings(tokenizer)])
        self.text_key = weights_hash(encoder, settings=settings)
        self._cut: list[str] = []

    @property
    def text_encoders(self) -> tuple[Any]:
        return (self.pipeline.text_encoder,)

    def _tokens(self, captions: list[str]) -> Any:
        tokenizer = self.pipeline.tokenizer
        texts = self.pipeline.maybe_convert_prompt(captions, tokenizer)  # embeddings of several tokens, as diffusers
        length = tokenizer.model_max_length
        self._cut += [text for text, ids in zip(captions, tokenizer(texts).input_ids, strict=True) if len(ids) > length]
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        tokens, (encoder,) = self._tokens(captions).to(self.device), self.text_encoders
        masked = getattr(encoder.config, "use_attention_mask", False)
        hidden = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
        return {"prompt_embeds": hidden.cpu()}

    def encode_prompt(self, prompt: str, negative_prompt: str) -> dict[str, Tensor]:
        wanted, other = self.encode_text([prompt, negative_prompt])["prompt_embeds"].split(1)
        return {"prompt_embeds": wanted, "negative_prompt_embeds": other}

    def text_bytes(self) -> int:
        return 4 * int(self.pipeline.tokenizer.model_max_length) * int(self.text_encoders[0].config.hidden_size)

    def free_encoders(self) -> None:
        if self._cut:
            length = self.pipeline.tokenizer.model_max_length
            logger.warning("%d captions were cut to %d tokens, first: %.80s", len(self._cut), length, self._cut[0])
            self._cut = []
        super().free_encoders()

    def pipeline_options(self) -> dict[str, Any]:
        return {"requires_safety_checker": False}


class Plan(PipelineBlueprint):
    """Networks of Stable Diffusion 1 and 2 with random weights."""

    kind = SD_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(batch, self.text_configs[0].max_position_embeddings, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        length, width = self.text_configs[0].max_position_embeddings, self.configs["unet"]["cross_attention_dim"]
        return {"prompt_embeds": torch.zeros(batch, length, width)}


class Export(PipelineExport):
    """A model of Stable Diffusion 1 or 2 in memory, ready to be written."""

    kind = SD_KIND
    load = staticmethod(load)
