"""Lumina2: flow matching with a transformer of one stream; a Gemma 2 encodes captions after a system prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpl.families.base import weights_hash
from lpl.families.frozen_text import OwnLengthFamily, trimmed
from lpl.families.kinds import LUMINA2_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER, GEMMA2_2B, VAE_16

MAX_LENGTH = 256
"""Tokens of a text, system prompt included, as in the pipeline by default."""
START = " <Prompt Start> "
"""What the pipeline puts between its system prompt and a prompt; a negative prompt has neither."""

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "Lumina2Pipeline", "text_encoder": ["transformers", "Gemma2Model"]},
    "transformer": {
        "_class_name": "Lumina2Transformer2DModel",
        "sample_size": 128,
        "in_channels": 16,
        "hidden_size": 2304,
        "num_layers": 26,
        "num_refiner_layers": 2,
        "num_attention_heads": 24,
        "num_kv_heads": 8,
        "cap_feat_dim": 2304,
    },
    "vae": VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": GEMMA2_2B,
    "scheduler": FLOW_SCHEDULER | {"shift": 6.0},
}
"""Configs of Lumina-Image-2.0, as published; what is left out is the class's default."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": (*ATTENTION, *MLP),
    "all": (*ATTENTION, *MLP, "norm1.linear"),
}
ORIGINAL_NAMES = (
    (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
    (r"^time_caption_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_caption_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^norm_out\.linear_1\.", "final_layer.adaLN_modulation.1."),
    (r"^norm_out\.linear_2\.", "final_layer.linear."),
    (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
    (r"\.norm1(\.norm)?\.", ".attention_norm1."),
    (r"\.norm2\.", ".attention_norm2."),
    (r"\.attn\.to_out\.0\.", ".attention.out."),
    (r"\.attn\.norm_([qk])\.", r".attention.\1_norm."),
    (r"\.attn\.", ".attention."),
    (r"\.feed_forward\.linear_", ".feed_forward.w"),
)
ORIGINAL_FUSED = {"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}
"""Maps diffusers' names to the original transformer's."""


class CaptionMask:
    """Has the methods of a mask, (B, n), that the transformer calls; it gives lengths without reading the device."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.device, self.shape = np.array(lengths), device, (len(lengths), max(lengths))

    def sum(self, dim: int) -> Any:
        return self.lengths

    def bool(self) -> Tensor:
        lengths = torch.tensor(self.lengths.tolist()).to(self.device, non_blocking=True)
        return torch.arange(self.shape[1], device=self.device) < lengths[:, None]


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise; the transformer's time is 1 - sigma, and it gives latents - noise."""
    lengths = text["lengths"].tolist()
    embeds, _ = trimmed(text["prompt_embeds"].to(noisy_latents.dtype), lengths)
    output: Tensor = denoiser(
        hidden_states=noisy_latents,
        timestep=1 - levels,
        encoder_hidden_states=embeds,
        encoder_attention_mask=CaptionMask(lengths, noisy_latents.device),
        return_dict=False,
    )[0]
    return -output


class Model(OwnLengthFamily):
    """A Lumina2Pipeline taken apart for training.

    A caption's text is the Gemma 2's second to last hidden states of its own tokens, system prompt included; a caption
    of "" gets no system prompt, like the pipeline's empty prompt.

    Guidance is the pipeline's: none + scale (text - none), scaled to text's norm in each row; a scale of 1 is none.
    """

    kind = LUMINA2_KIND
    steps, guidance = LUMINA2_KIND.steps, LUMINA2_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        super().prepare_text()
        self.text_key = weights_hash(settings=json.dumps([self.text_key, self.pipeline.system_prompt + START]))

    def _worded(self, caption: str) -> str:
        return f"{self.pipeline.system_prompt}{START}{caption}" if caption else ""

    def lengths(self, captions: list[str]) -> list[int]:
        return [len(ids) for ids in self.pipeline.tokenizer([self._worded(text) for text in captions]).input_ids]

    def embed_one(self, caption: str) -> Tensor:
        return self._embedded(self._worded(caption))

    def _embedded(self, text: str) -> Tensor:
        """Hidden states (n, W) of a text without changes."""
        count = min(len(self.pipeline.tokenizer(text).input_ids), MAX_LENGTH)
        row: Tensor = self.pipeline._get_gemma_prompt_embeds(text, self.device, count)[0][0]
        return row

    @torch.no_grad()
    def encode_prompt(self, prompt: str, negative_prompt: str, joint: Any = None) -> Mapping[str, Tensor]:
        texts = self.pipeline.system_prompt + START + prompt, negative_prompt
        rows = [self._embedded(text).float() for text in texts]
        length = max(map(len, rows))  # the pipeline needs equal lengths
        found = {}
        for name, row in zip(("prompt", "negative_prompt"), rows, strict=True):
            found[f"{name}_embeds"] = nn.functional.pad(row, (0, 0, 0, length - len(row)))[None]
            found[f"{name}_attention_mask"] = (torch.arange(length, device=row.device) < len(row)).long()[None]
        return found


class Plan(PipelineBlueprint):
    """Networks of Lumina2 with random weights."""

    kind = LUMINA2_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, MAX_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Any]:
        embeds = torch.zeros(batch, MAX_LENGTH, self.configs["transformer"]["cap_feat_dim"])
        return {"prompt_embeds": embeds, "lengths": np.full(batch, MAX_LENGTH)}  # an array: its values are read


class Export(PipelineExport):
    """A Lumina2 in memory, ready to be written."""

    kind = LUMINA2_KIND
    architecture = "lumina-2"
    original_names = ORIGINAL_NAMES
    original_fused = ORIGINAL_FUSED
