"""AuraFlow: flow matching with a transformer of two streams, then one; a UMT5 encodes the captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpl.families.frozen_text import OwnLengthFamily
from lpl.families.kinds import AURAFLOW_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER
from lpl.families.sdxl_configs import PUBLISHED as SDXL

MAX_LENGTH = 256
"""Tokens of a text, as in the pipeline by default; the transformer reads zeros in place of missing ones."""

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "AuraFlowPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]},
    "transformer": {"_class_name": "AuraFlowTransformer2DModel", "pos_embed_max_size": 9216},
    "vae": SDXL["vae"],
    "text_encoder": {
        "d_model": 2048,
        "d_ff": 5120,
        "d_kv": 64,
        "num_heads": 32,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "scheduler": FLOW_SCHEDULER | {"shift": 1.73},
}
"""Configs of AuraFlow-v0.3, as published; what is left out is the class's default."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = tuple(f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("linear_1", "linear_2", "out_projection"))
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
    """See families.base.Family.denoise; the transformer gets sigma as its time."""
    output: Tensor = denoiser(
        hidden_states=noisy_latents,
        timestep=levels,
        encoder_hidden_states=whole(text["prompt_embeds"].to(noisy_latents.dtype)),
        return_dict=False,
    )[0]
    return output


def whole(embeds: Tensor) -> Tensor:
    """Embeddings (B, n, W) with zeros up to all tokens, (B, 256, W)."""
    return nn.functional.pad(embeds, (0, 0, 0, MAX_LENGTH - embeds.shape[1]))


class Model(OwnLengthFamily):
    """An AuraFlowPipeline taken apart for training.

    A caption's text is the UMT5's last hidden states of the caption's own tokens; the side on which zeros are added
    does not matter to the transformer.
    """

    kind = AURAFLOW_KIND
    steps, guidance = AURAFLOW_KIND.steps, AURAFLOW_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    denoise = staticmethod(denoise)

    def embed_one(self, caption: str) -> Tensor:
        count = min(max(1, *self.lengths([caption])), MAX_LENGTH)
        row: Tensor = self.pipeline.encode_prompt(caption, None, False, 1, self.device, max_sequence_length=count)[0][0]
        return row

    def encode_prompt(self, prompt: str, negative_prompt: str, joint: Any = None) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            embeds = whole(self.prompt_row(text)[None])
            found |= {f"{name}_embeds": embeds, f"{name}_attention_mask": torch.ones(1, MAX_LENGTH)}  # asked, unused
        return found


class Plan(PipelineBlueprint):
    """Networks of AuraFlow with random weights."""

    kind = AURAFLOW_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, MAX_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(batch, MAX_LENGTH, self.text_configs[0].d_model)}


class Export(PipelineExport):
    """An AuraFlow in memory, ready to be written."""

    kind = AURAFLOW_KIND
    architecture = "auraflow"
