"""Z-Image: flow matching with a transformer of one stream; a Qwen3 encodes the captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lpl.families.frozen_text import OwnLengthFamily
from lpl.families.joint import JointModel
from lpl.families.kinds import ZIMAGE_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER, QWEN3_4B, VAE_16

MAX_LENGTH = 512
"""Tokens that the Qwen3 reads, template included, as in the pipeline by default."""

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "ZImagePipeline", "text_encoder": ["transformers", "Qwen3Model"]},
    "transformer": {"_class_name": "ZImageTransformer2DModel", "axes_lens": [1536, 512, 512]},
    "vae": VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": QWEN3_4B,
    "scheduler": FLOW_SCHEDULER | {"shift": 6.0},
}
"""Configs of Z-Image, as published; what is left out is the class's default."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
# By number: the same name in the final layer is no matrix.
BLOCKS = (*(f"layers.{n}" for n in range(64)), *(f"noise_refiner.{n}" for n in range(8)))
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": (*ATTENTION, *MLP),
    "all": (*ATTENTION, *MLP, *(f"{block}.adaLN_modulation.0" for block in BLOCKS)),
}
ORIGINAL_NAMES = (
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
)
ORIGINAL_FUSED = {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}
"""Maps diffusers' names to the original transformer's."""


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise; the transformer's time is 1 - sigma, and it gives latents - noise."""
    embeds = text["prompt_embeds"].to(noisy_latents.dtype).unbind(0)
    captions = [row[:length] for row, length in zip(embeds, text["lengths"].tolist(), strict=True)]
    images = list(noisy_latents.unsqueeze(2).unbind(0))  # (C, 1, h, w) each
    output = denoiser(images, 1 - levels, captions, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


class Model(OwnLengthFamily):
    """A ZImagePipeline taken apart for training; a caption of "" is what the pipeline uses for none.

    A caption's text is the Qwen3's second to last hidden states of its own tokens, in a chat template.

    Guidance is the pipeline's: text + scale (text - none); a scale of 0 is none.
    """

    kind = ZIMAGE_KIND
    steps, guidance = ZIMAGE_KIND.steps, ZIMAGE_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    chat: ClassVar = {"add_generation_prompt": True, "enable_thinking": True}
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        super().prepare_text()
        if ZIMAGE_KIND.is_turbo(self.pipeline.scheduler.config):
            self.steps, self.guidance = 9, 0.0  # by its model's card

    def embed_one(self, caption: str) -> Tensor:
        count = min(self.lengths([caption])[0], MAX_LENGTH)
        # In a new list, since the pipeline writes the template into it.
        row: Tensor = self.pipeline.encode_prompt([caption], self.device, False, max_sequence_length=count)[0][0]
        return row

    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        wanted, other = self.prompt_row(prompt), self.prompt_row(negative_prompt)
        return {"prompt_embeds": [wanted], "negative_prompt_embeds": [other]}


class Plan(PipelineBlueprint):
    """Networks of Z-Image with random weights."""

    kind = ZIMAGE_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, MAX_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Any]:
        embeds = torch.zeros(batch, MAX_LENGTH, self.text_configs[0].hidden_size)
        return {"prompt_embeds": embeds, "lengths": np.full(batch, MAX_LENGTH)}  # an array: its values are read


class Export(PipelineExport):
    """A Z-Image model in memory, ready to be written."""

    kind = ZIMAGE_KIND
    architecture = "z-image"
    original_names = ORIGINAL_NAMES
    original_fused = ORIGINAL_FUSED
