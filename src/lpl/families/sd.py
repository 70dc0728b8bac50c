"""Stable Diffusion 1 and 2, by any schedule that SDXL has: like it without sizes, with one text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpl.config import ModelConfig
from lpl.families import sdxl_export
from lpl.families.base import config_settings, tokenizer_settings, weights_hash
from lpl.families.joint import JointModel, body_of
from lpl.families.kinds import SD_KIND
from lpl.families.lora_files import text_module
from lpl.families.lora_names import WeightOf, renamed_lora, underscored
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.pipeline_family import PipelineFamily
from lpl.families.schedulers import unet_time
from lpl.families.sdxl_configs import PUBLISHED as SDXL_PUBLISHED
from lpl.families.sdxl_names import LORA_TARGETS, WITH_TEXT, modelspec

CLIP_L, CLIP_H = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
"""How the names of text encoders' weights begin in the original layout, of Stable Diffusion 1 and 2."""
ARCHITECTURES = ("stable-diffusion-v1", "stable-diffusion-v2")
"""modelspec's names of the architectures."""

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
    },
    "vae": SDXL_PUBLISHED["vae"] | {"sample_size": 512, "scaling_factor": 0.18215},
    "text_encoder": SDXL_PUBLISHED["text_encoder"],
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


class SDJointModel(JointModel):
    """The UNet with the text encoder before it; with --clip_skip the encoder's last layers are not used."""

    unet: Any
    text_encoder: Any

    def __init__(self, unet: Any, text_encoder: Any, skip: int) -> None:
        used = {"text_encoder": len(body_of(text_encoder).encoder.layers) - skip} if skip else {}
        super().__init__({"unet": unet, "text_encoder": text_encoder}, used)
        self.skip = skip

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The UNet's output, (B, C, h, w), for captions as tokens."""
        embeds = self.encode(text).to(noisy_latents.dtype)
        output: Tensor = self.unet(noisy_latents, timesteps, embeds, return_dict=False)[0]
        return output

    def encode(self, text: Mapping[str, Tensor]) -> Tensor:
        """Hidden states (B, length, C), with gradient."""
        return embed(self.text_encoder, text, self.skip)


def embed(encoder: Any, text: Mapping[str, Tensor], skip: int) -> Tensor:
    """Hidden states (B, length, C) of tokens, after the last norm, from `skip` layers before the last one."""
    output = encoder(text["input_ids"].long(), attention_mask=text.get("mask"), output_hidden_states=skip > 0)
    found: Tensor = body_of(encoder).final_layer_norm(output.hidden_states[-1 - skip]) if skip else output[0]
    return found


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
        trained: Tensor = denoiser(noisy_latents, timesteps, text)
        return trained
    embeds = text["prompt_embeds"].to(noisy_latents.dtype)
    output: Tensor = denoiser(noisy_latents, timesteps, embeds, return_dict=False)[0]
    return output


class Model(PipelineFamily):
    """A StableDiffusionPipeline taken apart for training; a caption of "" is what the pipeline uses for none."""

    kind = SD_KIND
    steps, guidance = SD_KIND.steps, SD_KIND.guidance
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        (encoder,), config, tokenizer = self.text_encoders, self.config, self.pipeline.tokenizer
        encoder.float().eval().requires_grad_(False)
        self.skip, self.trains_text = config.clip_skip or 0, config.train_text_encoder
        # Silences a warning that a long caption cannot be encoded: it is cut, which is logged once.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._cut: list[str] = []
        self.lora_targets: Mapping[str, tuple[str, ...]] = WITH_TEXT if self.trains_text else LORA_TARGETS
        if self.trains_text:
            self.text_key = weights_hash(settings=json.dumps(["tokens", tokenizer_settings(tokenizer)]))
            if self.denoiser is not None:  # lpl cache loads none
                self.denoiser = SDJointModel(self.denoiser, encoder, self.skip)
        else:
            settings = [config_settings(encoder.config.to_dict()), tokenizer_settings(tokenizer), self.skip]
            self.text_key = weights_hash(encoder, settings=json.dumps(settings))

    @property
    def text_encoders(self) -> tuple[Any]:
        return (self.pipeline.text_encoder,)

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids (B, length), and a mask where the encoder takes one."""
        tokenizer = self.pipeline.tokenizer
        texts = self.pipeline.maybe_convert_prompt(captions, tokenizer)  # embeddings of several tokens, as diffusers
        length = tokenizer.model_max_length
        self._cut += [text for text, ids in zip(captions, tokenizer(texts).input_ids, strict=True) if len(ids) > length]
        found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(self.text_encoders[0].config, "use_attention_mask", False)
        return {"input_ids": found.input_ids.int()} | ({"mask": found.attention_mask.int()} if masked else {})

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        tokens = self._tokens(captions)
        if self.trains_text:
            return tokens
        sent = {name: value.to(self.device) for name, value in tokens.items()}
        return {"prompt_embeds": embed(self.text_encoders[0], sent, self.skip).cpu()}

    def encode_prompt(self, prompt: str, negative_prompt: str, joint: JointModel | None = None) -> dict[str, Tensor]:
        found = self.encode_text([prompt, negative_prompt])
        if joint is None:
            embeds = found["prompt_embeds"]
        else:
            embeds = joint.encode({name: value.to(self.device) for name, value in found.items()})
        wanted, other = embeds.split(1)
        return {"prompt_embeds": wanted, "negative_prompt_embeds": other}

    def text_bytes(self) -> int:
        width = 1 if self.trains_text else int(self.text_encoders[0].config.hidden_size)
        return 4 * int(self.pipeline.tokenizer.model_max_length) * width

    def free_encoders(self) -> None:
        self.say_cut(self._cut, self.pipeline.tokenizer.model_max_length)
        self._cut = []
        super().free_encoders()

    def pipeline_options(self) -> dict[str, Any]:
        return {"requires_safety_checker": False}


class Plan(PipelineBlueprint):
    """Networks of Stable Diffusion 1 and 2 with random weights."""

    kind = SD_KIND
    denoise = staticmethod(denoise)

    def __init__(self, configs: Mapping[str, Any], config: ModelConfig) -> None:
        super().__init__(configs, config)
        self.trains_text = config.train_text_encoder
        self.lora_targets = WITH_TEXT if self.trains_text else LORA_TARGETS

    def denoiser(self) -> Any:
        unet = super().denoiser()
        return SDJointModel(unet, self.text_encoders()[0], self.config.clip_skip or 0) if self.trains_text else unet

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(batch, self.text_configs[0].max_position_embeddings, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        (ids,) = self.tokens(batch)
        if self.trains_text:
            return {"input_ids": ids.int()}
        return {"prompt_embeds": torch.zeros(*ids.shape, self.configs["unet"]["cross_attention_dim"])}


def is_second(unet: Mapping[str, Any]) -> bool:
    """Whether a UNet with this config belongs to Stable Diffusion 2."""
    return bool(unet.get("use_linear_projection"))


def kohya_layer(part: str, module: str, unet: Mapping[str, Any]) -> str:
    """kohya's name of a layer: diffusers' in the UNet, transformers' in the text encoder."""
    if part == "unet":
        return underscored("lora_unet", module)
    return underscored("lora_te", text_module(module))


def to_kohya(
    lora: Path, configs: Mapping[str, Any], title: str, weight_of: WeightOf | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA file in kohya's naming, see renamed_lora."""
    second = is_second(configs["unet"])
    version = {"ss_base_model_version": "sd_v2" if second else "sd_v1", "ss_v2": str(second)}
    layer, said = partial(kohya_layer, unet=configs["unet"]), modelspec(title, f"{ARCHITECTURES[second]}/lora")
    return renamed_lora(lora, layer, version | said, weight_of)


class Export(PipelineExport):
    """A model of Stable Diffusion 1 or 2 in memory, ready to be written, also in the original layout."""

    kind = SD_KIND

    def single_file(self, title: str) -> tuple[Any, dict[str, str]]:
        """Names and tensors of the original layout, and modelspec's metadata."""
        pipeline, second = self.pipeline, is_second(self.pipeline.unet.config)
        sdxl_export.warn_of_scale(pipeline.vae.config.scaling_factor, PUBLISHED["vae"]["scaling_factor"])
        resolution = SD_KIND.native_resolution(self.configs)
        metadata = sdxl_export.modelspec(pipeline, title, resolution, ARCHITECTURES[second])
        return original_tensors(pipeline, second), metadata


def original_tensors(pipeline: Any, second: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its original name.

    The original text encoder of Stable Diffusion 2 has one more layer, whose output no program uses: a copy of the last
    layer is written in its place.

    Raises:
        UserError: a weight that the layout has no place for.
    """
    yield from sdxl_export.unet_tensors(pipeline.unet)
    yield from sdxl_export.vae_tensors(pipeline.vae)
    if not second:
        yield from sdxl_export.clip_l_tensors(pipeline.text_encoder, CLIP_L)
        return
    last = len(body_of(pipeline.text_encoder).encoder.layers) - 1
    for name, value in sdxl_export.clip_g_tensors(pipeline.text_encoder, CLIP_H):
        yield name, value
        if f".resblocks.{last}." in name:
            yield name.replace(f".resblocks.{last}.", f".resblocks.{last + 1}."), value.clone()
