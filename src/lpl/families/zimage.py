"""Z-Image: flow matching on a transformer of one stream, whose captions a Qwen3 reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lpl.families.frozen_text import FrozenTextFamily
from lpl.families.joint import JointModel
from lpl.families.kinds import ZIMAGE_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER, QWEN3_4B, VAE_16

MAX_LENGTH = 512
"""Tokens that the Qwen3 reads, template included, as the pipeline does by default."""
MULTIPLE = 32
"""The transformer fills captions up to a multiple of this, with a token of its own."""

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
# By number: of the final layer it is no matrix.
BLOCKS = (*(f"layers.{n}" for n in range(64)), *(f"noise_refiner.{n}" for n in range(8)))
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": (*ATTENTION, *MLP),
    "all": (*ATTENTION, *MLP, *(f"{block}.adaLN_modulation.0" for block in BLOCKS)),
}


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


class Model(FrozenTextFamily):
    """A ZImagePipeline taken apart for training; a caption of "" is what the pipeline uses for none.

    A caption's text is the Qwen3's last hidden states but one, of as many tokens as it has, in a chat template; what is
    cached is filled up with zeros to a multiple of 32, which the transformer does not read. Captions are encoded one by
    one: in a batch the shorter ones cost as much as the longest.

    Guidance is the pipeline's: text + scale (text - none), of which 0 is none.
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

    def embed(self, captions: list[str]) -> dict[str, Tensor | list[Tensor]]:
        counts = [min(length, MAX_LENGTH) for length in self.lengths(captions)]
        rows = [
            # In a list of its own: the pipeline writes the template into it.
            self.pipeline.encode_prompt([caption], self.device, False, max_sequence_length=count)[0][0]
            for caption, count in zip(captions, counts, strict=True)
        ]
        filled = [nn.functional.pad(row, (0, 0, 0, -len(row) % MULTIPLE)) for row in rows]
        return {"prompt_embeds": filled, "lengths": torch.tensor([len(row) for row in rows])}

    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        found = self.encode_text([prompt, negative_prompt])
        pairs = zip(found["prompt_embeds"], found["lengths"].tolist(), strict=True)  # type: ignore[union-attr]
        wanted, other = (row[:length].float() for row, length in pairs)
        return {"prompt_embeds": [wanted], "negative_prompt_embeds": [other]}

    def text_bytes(self) -> int:
        return 2 * 128 * int(self.text_encoders[0].config.hidden_size)  # of usual captions, in two bytes


class Plan(PipelineBlueprint):
    """Networks of Z-Image with random weights."""

    kind = ZIMAGE_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, MAX_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Any]:
        embeds = torch.zeros(batch, MAX_LENGTH, self.text_configs[0].hidden_size)
        return {"prompt_embeds": embeds, "lengths": np.full(batch, MAX_LENGTH)}  # read, which no fake tensor can be


class Export(PipelineExport):
    """A Z-Image model in memory, ready to be written."""

    kind = ZIMAGE_KIND
