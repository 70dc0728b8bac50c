"""Sana: flow matching on latents of 32 pixels a cell, with the hidden states of a Gemma 2."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from lpl.base.terminal import quiet
from lpl.families.base import weights_hash
from lpl.families.frozen_text import FrozenTextFamily, widened
from lpl.families.joint import JointModel
from lpl.families.kinds import SANA_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import GEMMA2_2B

MAX_LENGTH = 300
"""Tokens of a text, start token included, as in the pipeline by default."""
INSTRUCTED_LENGTH = 512
"""About as many tokens as a caption has with the instruction before it, for a plan."""
INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the pipeline's call puts before each prompt, but not before a negative one."""

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "SanaPipeline", "text_encoder": ["transformers", "Gemma2Model"]},
    "transformer": {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": 20,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
    },
    "vae": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
    "text_encoder": GEMMA2_2B,
    "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0},
}
"""Configs of Sana of 1.6 billion parameters at 1024 pixels, as published; what is left out is the class's default."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ff.conv_inverted", "ff.conv_point")
LORA_TARGETS = {"attention": ATTENTION, "attention_mlp": (*ATTENTION, *MLP), "all": (*ATTENTION, *MLP)}
"""Without the depthwise convolutions, ff.conv_depth: peft puts no LoRA on them."""


def denoise(
    denoiser: Any,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise; the transformer gets 1000 sigma, times its own scale, as its time."""
    scale = 1000 * getattr(denoiser, "module", denoiser).config.timestep_scale  # an engine may have wrapped it
    output: Tensor = denoiser(
        noisy_latents,
        encoder_hidden_states=text["prompt_embeds"].to(noisy_latents.dtype),
        encoder_attention_mask=text["prompt_attention_mask"],
        timestep=scale * levels,
        return_dict=False,
    )[0]
    return output


class Model(FrozenTextFamily):
    """A SanaPipeline taken apart for training.

    A caption is encoded with the pipeline's instruction before it, one of "" without it, like the pipeline's empty
    prompt. The VAE is deterministic: its posterior has a standard deviation of 0.
    """

    kind = SANA_KIND
    steps, guidance = SANA_KIND.steps, SANA_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH - 1  # one token is the instruction's last
    mask = "prompt_attention_mask"
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        super().prepare_text()
        self.text_key = weights_hash(settings=json.dumps([self.text_key, INSTRUCTION]))

    def _encoded(self, captions: list[str], instructed: bool) -> dict[str, Tensor]:
        instruction = INSTRUCTION if instructed else None
        with quiet(type(self.pipeline).__module__):
            embeds, mask, _, _ = self.pipeline.encode_prompt(
                captions,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=MAX_LENGTH,
                complex_human_instruction=instruction,
            )
        return {"prompt_embeds": embeds, self.mask: mask}

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        found: dict[int, dict[str, Tensor]] = {}
        for instructed in (True, False):
            places = [n for n, caption in enumerate(captions) if bool(caption) == instructed]
            if places:
                encoded = self._encoded([captions[n] for n in places], instructed)
                found |= {n: {name: v[row] for name, v in encoded.items()} for row, n in enumerate(places)}
        return {name: torch.stack([found[n][name] for n in range(len(captions))]) for name in found[0]}

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        wanted, other = self._encoded([prompt], True), self._encoded([negative_prompt], False)
        found = wanted | {f"negative_{name}": value for name, value in other.items()}
        return {name: widened(value) for name, value in found.items()}

    def text_bytes(self) -> int:
        return 4 * MAX_LENGTH * (int(self.text_encoders[0].config.hidden_size) + 1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.vae.encode(pixels.to(self.device, torch.float32)).latent.cpu()
        return latents, torch.zeros_like(latents)

    def sampling_kwargs(self) -> dict[str, Any]:
        return super().sampling_kwargs() | self.call_options(self.pipeline) | {"negative_prompt": None}

    @staticmethod
    def call_options(pipeline: Any) -> dict[str, Any]:
        return {"use_resolution_binning": False}  # images have the size that is asked for


class Plan(PipelineBlueprint):
    """Sana's networks with random weights."""

    kind = SANA_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(batch, INSTRUCTED_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        width = self.configs["transformer"]["caption_channels"]
        mask = torch.ones(batch, MAX_LENGTH, dtype=torch.long)
        return {"prompt_embeds": torch.zeros(batch, MAX_LENGTH, width), "prompt_attention_mask": mask}


class Export(PipelineExport):
    """A Sana in memory, ready to be written."""

    kind = SANA_KIND
    architecture = "sana"
