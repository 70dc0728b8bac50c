"""Chroma: Flux.1's blocks without its CLIP and its guidance; it reads a T5's tokens and one of padding after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from lpl.families import flux
from lpl.families.frozen_text import OwnLengthFamily, trimmed
from lpl.families.kinds import CHROMA_KIND
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_export import PipelineExport
from lpl.families.published import FLOW_SCHEDULER, T5_XXL

MAX_LENGTH = 512
"""Tokens of a text, as the pipeline has them by default."""

PUBLISHED: dict[str, Any] = {
    "index": {"_class_name": "ChromaPipeline", "text_encoder": ["transformers", "T5EncoderModel"]},
    "transformer": {"_class_name": "ChromaTransformer2DModel", "joint_attention_dim": 4096},
    "vae": flux.PUBLISHED["vae"],
    "text_encoder": T5_XXL | {"dtype": "bfloat16"},
    "scheduler": FLOW_SCHEDULER | {"shift": 1.0},
}
"""Configs of Chroma1-HD: the class's defaults, and a schedule without a shift, as in its origin Flux.1 schnell."""

LORA_TARGETS = {
    "attention": flux.ATTENTION,
    "attention_mlp": (*flux.ATTENTION, *flux.MLP),
    "all": (*flux.ATTENTION, *flux.MLP),  # no block has modulation layers
}


class ChromaPipeline(diffusers.ChromaPipeline):
    """diffusers' class of that name, with a mask that really masks.

    Differs from diffusers (0.42.1): there the mask is numeric, and attention adds it to its logits, so that masked
    tokens are read, too, only a little less than the others.
    """

    def _get_t5_prompt_embeds(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        embeds, mask = super()._get_t5_prompt_embeds(*args, **options)
        return embeds, mask.bool()


@contextmanager
def masked(transformer: Any, mask: Tensor | None) -> Iterator[None]:
    """Passes a mask to recomputed blocks of one stream, which the transformer calls without it (diffusers 0.42.1)."""
    if mask is None or not transformer.gradient_checkpointing:
        yield
        return
    function = transformer._gradient_checkpointing_func

    def run(block: Any, *given: Any) -> Any:
        has_it = any(value is mask for value in given)
        return function(block if has_it else partial(block, attention_mask=mask), *given)

    transformer._gradient_checkpointing_func = run
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = function


def denoise(
    denoiser: Any,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise: cells of 2 x 2 are tokens of 4 C values, (B, h w / 4, 4 C).

    Captions of one length get no mask, since attention is faster without.
    """
    (batch, channels, height, width), device = noisy_latents.shape, noisy_latents.device
    embeds, counted = trimmed(text["prompt_embeds"].to(noisy_latents.dtype), text["lengths"].tolist())
    packed = ChromaPipeline._pack_latents(noisy_latents.contiguous(), batch, channels, height, width)
    mask = None if counted is None else torch.cat([counted, counted.new_ones(packed.shape[:2])], 1)
    with device:  # made on the device: a copy from the host would wait
        img_ids = ChromaPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, torch.float32)
    with masked(getattr(denoiser, "module", denoiser), mask):  # an engine may have wrapped it
        output = denoiser(
            hidden_states=packed,
            timestep=levels,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
            img_ids=img_ids,
            attention_mask=mask,
            return_dict=False,
        )[0]
    unpacked: Tensor = ChromaPipeline._unpack_latents(output, height, width, 1)
    return unpacked


class Model(OwnLengthFamily):
    """A ChromaPipeline taken apart for training.

    A caption's text is the T5's last hidden states of its tokens and of one padding token, which the model has learned
    to read; the T5's own attention masks padding.
    """

    kind = CHROMA_KIND
    steps, guidance = CHROMA_KIND.steps, CHROMA_KIND.guidance
    lora_targets = LORA_TARGETS
    max_length = MAX_LENGTH
    denoise = staticmethod(denoise)
    to_raw = staticmethod(flux.Model.to_raw)

    def embed_one(self, caption: str) -> Tensor:
        count = min(self.lengths([caption])[0] + 1, MAX_LENGTH)
        row: Tensor = self.pipeline._get_t5_prompt_embeds([caption], 1, count, self.device)[0][0]
        return row

    def encode_prompt(self, prompt: str, negative_prompt: str, joint: Any = None) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for start, text in (("", prompt), ("negative_", negative_prompt)):
            row = self.prompt_row(text)[None]
            found |= {f"{start}prompt_embeds": row, f"{start}prompt_attention_mask": torch.ones(row.shape[:2]).bool()}
        return found


class Plan(PipelineBlueprint):
    """Chroma's networks with random weights."""

    kind = CHROMA_KIND
    lora_targets = LORA_TARGETS
    denoise = staticmethod(denoise)

    def tokens(self, batch: int) -> list[Tensor]:
        return [torch.zeros(1, MAX_LENGTH, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Any]:
        embeds = torch.zeros(batch, MAX_LENGTH, self.configs["transformer"]["joint_attention_dim"])
        return {"prompt_embeds": embeds, "lengths": np.full(batch, MAX_LENGTH)}  # an array: its values are read


class Export(PipelineExport):
    """A Chroma in memory, ready to be written."""

    kind = CHROMA_KIND
