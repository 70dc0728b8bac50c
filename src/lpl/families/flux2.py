"""Flux.2 klein: flow matching on 2 x 2 cells of standardised latents, with three layers of a Qwen3."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn

from lpl.families.frozen_text import FrozenTextFamily
from lpl.families.kinds import KLEIN_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER, QWEN3_4B

MAX_LENGTH = 512
"""Tokens that the Qwen3 reads and passes to the transformer, padding included, as in the pipeline by default."""
DISTILLED_STEPS = 4

PUBLISHED: dict[str, Any] = {
    "index": {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    },
    "transformer": {
        "_class_name": "Flux2Transformer2DModel",
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "vae": {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 32,
    },
    "text_encoder": QWEN3_4B | {"tie_word_embeddings": True},
    "scheduler": FLOW_SCHEDULER | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}
"""Configs of FLUX.2-klein-base-4B, as published; what is left out is the class's default."""

JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# By number: in the joint blocks to_out is a list. Attention and MLP of these blocks are the same two matrices.
SINGLE = ("to_qkv_mlp_proj", *(f"single_transformer_blocks.{n}.attn.to_out" for n in range(64)))
MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
MODULATION = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
LORA_TARGETS = {
    "attention": (*JOINT, *SINGLE),
    "attention_mlp": (*JOINT, *SINGLE, *MLP),
    "all": (*JOINT, *SINGLE, *MLP, *(f"{name}.linear" for name in MODULATION)),
}
ORIGINAL_NAMES = (
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_guidance_embed\.timestep_embedder\.", "time_in."),
    (r"^time_guidance_embed\.guidance_embedder\.", "guidance_in."),
    (r"^(time_in|guidance_in)\.linear_1\.", r"\1.in_layer."),
    (r"^(time_in|guidance_in)\.linear_2\.", r"\1.out_layer."),
    (r"^(\w+_stream_modulation\w*)\.linear\.", r"\1.lin."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.linear1."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_", r"single_blocks.\1.norm.norm_"),
    (r"\.attn\.(norm_[qk])\.", r".img_attn.norm.\1."),
    (r"\.attn\.norm_added_([qk])\.", r".txt_attn.norm.norm_\1."),
    (r"\.norm_q\.weight", ".query_norm.scale"),
    (r"\.norm_k\.weight", ".key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.ff\.linear_in\.", ".img_mlp.0."),
    (r"\.ff\.linear_out\.", ".img_mlp.2."),
    (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
    (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
)
ORIGINAL_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Maps diffusers' names to the original transformer's, whose last modulation has its two halves swapped."""


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, h w / 4, 4 C) on the VAE's grid, (B, C, h, w)."""
    cells = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    grid: Tensor = Flux2KleinPipeline._unpatchify_latents(cells)
    return grid


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise: cells of 2 x 2 are tokens of 4 C values, (B, h w / 4, 4 C)."""
    device, embeds = noisy_latents.device, text["prompt_embeds"].to(noisy_latents.dtype)
    cells = Flux2KleinPipeline._patchify_latents(noisy_latents.contiguous())
    with device:  # made on the device: a copy from the host would wait
        txt_ids, img_ids = Flux2KleinPipeline._prepare_text_ids(embeds), Flux2KleinPipeline._prepare_latent_ids(cells)
    output = denoiser(
        hidden_states=Flux2KleinPipeline._pack_latents(cells),
        timestep=levels,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=txt_ids,
        img_ids=img_ids,
        return_dict=False,
    )[0]
    return unpacked(output, *noisy_latents.shape[2:])


class Model(FrozenTextFamily):
    """A Flux2KleinPipeline taken apart for training; a caption of "" is what the pipeline uses for none.

    A caption's text is the output of the Qwen3's layers 9, 18 and 27, concatenated, padding included: (B, 512, 3 W).
    Captions are encoded one by one, since a batch would hold the states of all layers and the logits at once.
    """

    kind = KLEIN_KIND
    steps, guidance = KLEIN_KIND.steps, KLEIN_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    chat: ClassVar = {"add_generation_prompt": True, "enable_thinking": False}
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        super().prepare_text()
        if self.pipeline.config.is_distilled:
            self.steps, self.guidance = DISTILLED_STEPS, 1.0

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        encode = self.pipeline.encode_prompt
        rows = [encode(caption, self.device, max_sequence_length=MAX_LENGTH)[0] for caption in captions]
        return {"prompt_embeds": torch.cat(rows)}

    def pipeline_options(self) -> dict[str, Any]:
        return {"is_distilled": self.pipeline.config.is_distilled}

    def sampling_parts(self, denoiser: nn.Module) -> dict[str, Any]:
        """The VAE with nothing but its statistics, which the pipeline undoes at the end."""
        statistics = copy.copy(self.vae)
        statistics._modules = {"bn": copy.deepcopy(self.vae.bn).to(self.device)}
        return super().sampling_parts(denoiser) | {"vae": statistics}

    @staticmethod
    def to_raw(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
        return latents


class Plan(PipelineBlueprint):
    """Networks of Flux.2 klein with random weights."""

    kind = KLEIN_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, MAX_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(batch, MAX_LENGTH, self.configs["transformer"]["joint_attention_dim"])}


class Export(PipelineExport):
    """A Flux.2 klein in memory, ready to be written."""

    kind = KLEIN_KIND
    architecture = "flux-2-klein"
    original_names = ORIGINAL_NAMES
    original_fused = ORIGINAL_FUSED
    original_swapped = "norm_out.linear"
