"""Qwen-Image: flow matching on packed latents of a video VAE, with the last hidden states of a Qwen2.5-VL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import QwenImagePipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from lpl.families.base import weights_hash
from lpl.families.files import vae_stride
from lpl.families.frozen_text import FrozenTextFamily, OwnLengthFamily, trimmed
from lpl.families.kinds import QWEN_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER

MAX_LENGTH = 1024
"""Maximum number of tokens of a caption and the template's end after it, as in the pipeline by default."""
USUAL_LENGTH = 512
"""Tokens that a plan assumes: captions are rarely longer, and there is no padding."""
NONE = " "
"""The text of an empty caption or negative prompt, as in the model's card."""

PUBLISHED: dict[str, Any] = {
    "index": {
        "_class_name": "QwenImagePipeline",
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    },
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae": {"_class_name": "AutoencoderKLQwenImage", "z_dim": 16, "temperal_downsample": [False, True, True]},
    "text_encoder": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1e6,
            "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        "dtype": "bfloat16",
    },
    "scheduler": FLOW_SCHEDULER
    | {
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
}
"""Configs of Qwen-Image, as published; what is left out is the class's default."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": (*ATTENTION, *MLP),
    "all": (*ATTENTION, *MLP, "img_mod.1", "txt_mod.1"),
}


class AutoencoderKLQwenImage(diffusers.AutoencoderKLQwenImage):
    """diffusers' class of that name, which takes and gives images (B, C, H, W) too, as videos of one frame."""

    def _encode(self, x: Tensor) -> Tensor:
        frames: Tensor = super()._encode(x if x.dim() == 5 else x.unsqueeze(2))
        return frames if x.dim() == 5 else frames.squeeze(2)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        frames: Tensor = super()._decode(z if z.dim() == 5 else z.unsqueeze(2)).sample
        return DecoderOutput(sample=frames if z.dim() == 5 else frames.squeeze(2))


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise: cells of 2 x 2 are tokens of 4 C values, (B, h w / 4, 4 C).

    Captions of one length get no mask, since attention is faster without.
    """
    batch, channels, height, width = noisy_latents.shape
    embeds, mask = trimmed(text["prompt_embeds"].to(noisy_latents.dtype), text["lengths"].tolist())
    output = denoiser(
        hidden_states=QwenImagePipeline._pack_latents(noisy_latents.contiguous(), batch, channels, height, width),
        timestep=levels,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    unpacked: Tensor = QwenImagePipeline._unpack_latents(output, height, width, 1)
    return unpacked.squeeze(2)


class Model(OwnLengthFamily):
    """A QwenImagePipeline taken apart for training.

    A caption's text is the Qwen2.5-VL's last hidden states of its own tokens, in a template whose beginning is dropped.

    Guidance is the pipeline's: none + scale (text - none), scaled to text's norm in each token; a scale of 1 is none.
    """

    kind = QWEN_KIND
    steps, guidance = QWEN_KIND.steps, QWEN_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        super().prepare_text()
        pipeline = self.pipeline
        template = [pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx, NONE]
        self.text_key = weights_hash(settings=json.dumps([self.text_key, template]))

    def lengths(self, captions: list[str]) -> list[int]:
        texts = [self.pipeline.prompt_template_encode.format(caption) for caption in captions]
        dropped = self.pipeline.prompt_template_encode_start_idx
        return [len(ids) - dropped for ids in self.pipeline.tokenizer(texts).input_ids]

    def embed_one(self, caption: str) -> Tensor:
        row: Tensor = self.pipeline.encode_prompt(caption or NONE, self.device, max_sequence_length=MAX_LENGTH)[0][0]
        return row

    def encode_prompt(self, prompt: str, negative_prompt: str, joint: Any = None) -> Mapping[str, Tensor]:
        found = {"": self.prompt_row(prompt)[None], "negative_": self.prompt_row(negative_prompt)[None]}
        embeds = {f"{which}prompt_embeds": row for which, row in found.items()}
        masks = {f"{which}prompt_embeds_mask": torch.ones(row.shape[:2]).long() for which, row in found.items()}
        return embeds | masks

    @staticmethod
    def guided(scale: float, count: int | None) -> dict[str, Any]:
        negative = {} if count is None or scale <= 1 else {"negative_prompt": [NONE] * count}
        return {"true_cfg_scale": scale} | negative

    @staticmethod
    def to_raw(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
        unpacked = QwenImagePipeline._unpack_latents(latents, height, width, vae_stride(vae.config))
        return FrozenTextFamily.to_raw(vae, unpacked.squeeze(2), height, width)


class Plan(PipelineBlueprint):
    """Networks of Qwen-Image with random weights."""

    kind = QWEN_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, USUAL_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Any]:
        embeds = torch.zeros(batch, USUAL_LENGTH, self.configs["transformer"]["joint_attention_dim"])
        return {"prompt_embeds": embeds, "lengths": np.full(batch, USUAL_LENGTH)}  # an array: its values are read


class Export(PipelineExport):
    """A Qwen-Image in memory, ready to be written."""

    kind = QWEN_KIND
    architecture = "qwen-image"
