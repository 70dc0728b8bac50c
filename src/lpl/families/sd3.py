"""Stable Diffusion 3 and 3.5: flow matching on a transformer that reads two CLIPs and a T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lpl.families.clips import CLIPBlueprint, CLIPFamily
from lpl.families.kinds import SD3_KIND
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import CLIP_G, CLIP_L, FLOW_SCHEDULER, T5_XXL, VAE_16

MAX_LENGTH = 256
"""Tokens that the T5 reads, as in the pipeline by default."""

PUBLISHED: dict[str, Any] = {
    "index": {
        "_class_name": "StableDiffusion3Pipeline",
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
    },
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "vae": VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": CLIP_L | {"dtype": "float16"},
    "text_encoder_2": CLIP_G | {"dtype": "float16"},
    "text_encoder_3": T5_XXL,
    "scheduler": FLOW_SCHEDULER,
}
"""Configs of stable-diffusion-3.5-medium, as published; what is left out is the class's default."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": (*ATTENTION, *MLP),
    "all": (*ATTENTION, *MLP, "norm1.linear", "norm1_context.linear"),
}


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise; the transformer gets 1000 sigma as its time."""
    if "input_ids" in text:
        trained: Tensor = denoiser(noisy_latents, levels, text)
        return trained
    dtype = noisy_latents.dtype
    output: Tensor = denoiser(
        hidden_states=noisy_latents,
        timestep=1000 * levels,
        encoder_hidden_states=text["prompt_embeds"].to(dtype),
        pooled_projections=text["pooled_prompt_embeds"].to(dtype),
        return_dict=False,
    )[0]
    return output


def read(clips: Sequence[Any], ids: Sequence[Tensor], long: Tensor | None, width: int) -> dict[str, Tensor]:
    """See families.clips.CLIPFamily.read.

    A caption's text is CLIP-L's and CLIP-G's second to last hidden states, concatenated and padded with zeros to T5's
    width, then T5's: (B, 77 + 256, 4096); a model may leave the T5 out, and then zeros replace it.
    """
    found = [clip(own, output_hidden_states=True) for clip, own in zip(clips, ids, strict=True)]
    hidden = torch.cat([output.hidden_states[-2] for output in found], -1)
    if long is None:
        long = hidden.new_zeros(len(hidden), MAX_LENGTH, width)
    hidden = nn.functional.pad(hidden, (0, long.shape[-1] - hidden.shape[-1])).to(long.dtype)
    pooled = torch.cat([output.text_embeds for output in found], -1)
    return {"prompt_embeds": torch.cat([hidden, long], 1), "pooled_prompt_embeds": pooled}


class Model(CLIPFamily):
    """A StableDiffusion3Pipeline taken apart for training; a caption of "" is what the pipeline uses for none."""

    kind = SD3_KIND
    steps, guidance = SD3_KIND.steps, SD3_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    denoise, read = staticmethod(denoise), staticmethod(read)

    def embed_long(self, captions: list[str]) -> Tensor | None:
        if self.pipeline.text_encoder_3 is None:
            return None
        found: Tensor = self.pipeline._get_t5_prompt_embeds(captions, 1, MAX_LENGTH, self.device)
        return found

    @property
    def limit(self) -> int:
        return MAX_LENGTH if self.pipeline.text_encoder_3 is not None else int(self.pipeline.tokenizer.model_max_length)


class Plan(CLIPBlueprint):
    """Networks of Stable Diffusion 3 and 3.5 with random weights."""

    kind = SD3_KIND
    lora_targets = LORA_TARGETS
    denoise, read = staticmethod(denoise), staticmethod(read)

    def tokens(self, batch: int) -> list[Tensor]:
        lengths = [getattr(config, "max_position_embeddings", MAX_LENGTH) for config in self.text_configs]
        return [torch.zeros(batch, length, dtype=torch.long) for length in lengths]

    def embeds(self, batch: int) -> dict[str, Tensor]:
        own, length = self.configs["transformer"], self.text_configs[0].max_position_embeddings + MAX_LENGTH
        return {
            "prompt_embeds": torch.zeros(batch, length, own["joint_attention_dim"]),
            "pooled_prompt_embeds": torch.zeros(batch, own["pooled_projection_dim"]),
        }

    def long(self, batch: int) -> Tensor | None:
        has_t5 = "text_encoder_3" in self.configs
        return torch.zeros(batch, MAX_LENGTH, self.configs["transformer"]["joint_attention_dim"]) if has_t5 else None


class Export(PipelineExport):
    """A model of Stable Diffusion 3 or 3.5 in memory, ready to be written."""

    kind = SD3_KIND
    architecture = "stable-diffusion-3"
