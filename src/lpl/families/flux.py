"""Flux.1 dev and schnell: flow matching on packed latents, with a T5 and a CLIP's pooled embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from lpl.families.clips import CLIPBlueprint, CLIPFamily
from lpl.families.files import vae_stride
from lpl.families.joint import JointModel
from lpl.families.kinds import FLUX_KIND
from lpl.families.pipeline_export import PipelineExport
from lpl.families.pipeline_family import logger
from lpl.families.published import CLIP_L, FLOW_SCHEDULER, T5_XXL, VAE_16

DISTILLED_STEPS = 4
TRAINED_GUIDANCE = 1.0
"""Input of the guidance embedding in training, as in diffusers' scripts: no strengthening."""

PUBLISHED: dict[str, Any] = {
    "index": {
        "_class_name": "FluxPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    },
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "vae": VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": CLIP_L | {"dtype": "bfloat16"},
    "text_encoder_2": T5_XXL | {"dtype": "bfloat16"},
    "scheduler": FLOW_SCHEDULER | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}
"""Configs of FLUX.1-dev, as published; what is left out is the class's default."""
SCHNELL = PUBLISHED | {
    "transformer": PUBLISHED["transformer"] | {"guidance_embeds": False},
    "scheduler": FLOW_SCHEDULER | {"shift": 1.0},
}
"""The same for FLUX.1-schnell."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# By number: the transformer's last layer is called proj_out too.
SINGLE = ("proj_mlp", *(f"single_transformer_blocks.{n}.proj_out" for n in range(64)))
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", *SINGLE)
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": (*ATTENTION, *MLP),
    "all": (*ATTENTION, *MLP, "norm1.linear", "norm1_context.linear", "norm.linear"),
}


def text_length(transformer: Mapping[str, Any]) -> int:
    """Tokens that the T5 reads and passes to the transformer, padding included: 512, for schnell 256."""
    return 512 if transformer.get("guidance_embeds") else 256


def denoise(
    denoiser: Any,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise: cells of 2 x 2 are tokens of 4 C values, (B, h w / 4, 4 C).

    The transformer itself rounds the time to its precision, in training as in sampling.
    """
    if "input_ids" in text:
        trained: Tensor = denoiser(noisy_latents, levels, text)
        return trained
    (batch, channels, height, width), dtype = noisy_latents.shape, noisy_latents.dtype
    embeds, device = text["prompt_embeds"].to(dtype), noisy_latents.device
    is_guided = getattr(denoiser, "module", denoiser).config.guidance_embeds  # an engine may have wrapped it
    guidance = torch.full((batch,), TRAINED_GUIDANCE, device=device) if is_guided else None
    packed = FluxPipeline._pack_latents(noisy_latents.contiguous(), batch, channels, height, width)
    with device:  # made on the device: a copy from the host would wait
        img_ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, torch.float32)
    output = denoiser(
        hidden_states=packed,
        timestep=levels,
        guidance=guidance,
        pooled_projections=text["pooled_prompt_embeds"].to(dtype),
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
        img_ids=img_ids,
        return_dict=False,
    )[0]
    unpacked: Tensor = FluxPipeline._unpack_latents(output, height, width, 1)
    return unpacked


def read(clips: Sequence[Any], ids: Sequence[Tensor], long: Tensor | None, width: int) -> dict[str, Tensor]:
    """See families.clips.CLIPFamily.read: the T5's hidden states, and the pooled embedding of the CLIP."""
    assert long is not None
    return {"prompt_embeds": long, "pooled_prompt_embeds": clips[0](ids[0]).pooler_output}


class Model(CLIPFamily):
    """A FluxPipeline taken apart for training; a caption of "" is encoded as any other."""

    kind = FLUX_KIND
    steps, guidance = FLUX_KIND.steps, FLUX_KIND.guidance
    lora_targets = LORA_TARGETS
    denoise, read = staticmethod(denoise), staticmethod(read)

    def prepare_text(self) -> None:
        transformer = self.kind.plan_configs(self.config)["transformer"]
        self.max_length = text_length(transformer)
        if not transformer.get("guidance_embeds"):
            self.steps = DISTILLED_STEPS
        super().prepare_text()

    def embed_long(self, captions: list[str]) -> Tensor:
        found: Tensor = self.pipeline._get_t5_prompt_embeds(captions, 1, self.max_length, self.device)
        return found

    def prepare_prompt(self, prompt: str, negative_prompt: str = "") -> None:
        if negative_prompt:
            logger.warning("%s draws without negative prompts: %.80s", self.kind.name, negative_prompt)
        super().prepare_prompt(prompt, negative_prompt)

    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        found = super().encode_prompt(prompt, negative_prompt, joint)
        return {name: value for name, value in found.items() if not name.startswith("negative_")}

    @staticmethod
    def call_options(pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": text_length(pipeline.transformer.config)}

    @staticmethod
    def to_raw(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
        unpacked = FluxPipeline._unpack_latents(latents, height, width, vae_stride(vae.config))
        return CLIPFamily.to_raw(vae, unpacked, height, width)


class Plan(CLIPBlueprint):
    """Flux.1's networks with random weights."""

    kind = FLUX_KIND
    lora_targets = LORA_TARGETS
    denoise, read = staticmethod(denoise), staticmethod(read)

    def tokens(self, batch: int) -> list[Tensor]:
        lengths = self.text_configs[0].max_position_embeddings, text_length(self.configs["transformer"])
        return [torch.zeros(batch, length, dtype=torch.long) for length in lengths]

    def embeds(self, batch: int) -> dict[str, Tensor]:
        pooled = torch.zeros(batch, self.configs["transformer"]["pooled_projection_dim"])
        return {"prompt_embeds": self.long(batch), "pooled_prompt_embeds": pooled}

    def long(self, batch: int) -> Tensor:
        own = self.configs["transformer"]
        return torch.zeros(batch, text_length(own), own["joint_attention_dim"])


class Export(PipelineExport):
    """A Flux.1 in memory, ready to be written."""

    kind = FLUX_KIND

    def single_file(self, title: str) -> tuple[Any, dict[str, str]]:
        """Names and tensors of the transformer, and its metadata."""
        self.architecture = "flux-1-dev" if self.pipeline.transformer.config.guidance_embeds else "flux-1-schnell"
        return super().single_file(title)
