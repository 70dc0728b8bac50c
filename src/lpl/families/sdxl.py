"""SDXL: loading, encoding, conditioning, all through diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lpl.families.base import weights_hash
from lpl.families.joint import JointModel
from lpl.families.pipeline_family import PipelineFamily, logger
from lpl.families.sdxl_check import SDXL_KIND
from lpl.families.sdxl_names import LORA_TARGETS, WITH_TEXT
from lpl.families.sdxl_networks import SDXLJointModel, denoise, token_fields
from lpl.families.sdxl_text import PromptEncoder, guided


class SDXL(PipelineFamily):
    """A StableDiffusionXLPipeline taken apart for training.

    Differs from the diffusers scripts: a dropped caption is what the pipeline uses for no caption (zeros where the
    model says force_zeros_for_empty_prompt), not the encoding of "". See also PromptEncoder.

    With --train_text_encoder the denoiser is an SDXLJointModel: a caption's tokens are cached, and prompts are encoded
    when their images are sampled, with the current weights.
    """

    kind = SDXL_KIND
    steps, guidance = SDXL_KIND.steps, SDXL_KIND.guidance
    denoise = staticmethod(denoise)

    def prepare_text(self) -> None:
        for encoder in self.text_encoders:
            # In float32 for any run's precision: they encode once, and the result is saved in float32.
            encoder.float().eval().requires_grad_(False)
        config = self.config
        self.force_zeros = bool(self.pipeline.config.force_zeros_for_empty_prompt)
        self._cut: list[str] = []
        self._encode_prompts = PromptEncoder(self.pipeline, config.clip_skip, config.max_token_length)
        self.trains_text = config.train_text_encoder
        self.lora_targets: Mapping[str, tuple[str, ...]] = WITH_TEXT if self.trains_text else LORA_TARGETS
        if self.trains_text:
            layer, settings = self._encode_prompts.layer, self._encode_prompts.token_settings
            self.text_key = weights_hash(settings=settings)
            if self.denoiser is not None:  # lpl cache loads none
                self.denoiser = SDXLJointModel(self.denoiser, *self.text_encoders, layer, self.force_zeros)
        else:
            settings = f"{self.force_zeros} {self._encode_prompts.settings}"
            self.text_key = weights_hash(*self.text_encoders, settings=settings)

    @property
    def text_encoders(self) -> tuple[Any, Any]:
        return self.pipeline.text_encoder, self.pipeline.text_encoder_2

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        self._cut += self._encode_prompts.cut(captions)
        if self.trains_text:
            return token_fields(*self._encode_prompts.tokens(captions), captions)
        embeds, pooled = self._encode_prompts(captions, self.device)
        if self.force_zeros:
            keep = torch.tensor([caption != "" for caption in captions], device=embeds.device)
            embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        return {"prompt_embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def text_bytes(self) -> int:
        return self._encode_prompts.entry_bytes(of_tokens=self.trains_text)

    def encode_prompt(self, prompt: str, negative_prompt: str, joint: JointModel | None = None) -> dict[str, Tensor]:
        def encode(text: str) -> tuple[Tensor, Tensor]:
            if joint is None:
                return self._encode_prompts([text], self.device)
            fields = token_fields(*self._encode_prompts.tokens([text]), [text])
            found: tuple[Tensor, Tensor] = joint.encode({name: value.to(self.device) for name, value in fields.items()})
            return found

        names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
        return dict(zip(names, guided(prompt, negative_prompt, encode, self.force_zeros), strict=True))

    def free_encoders(self) -> None:
        if self._cut:
            logger.warning(
                "%d captions were cut to %d tokens (--max_token_length %d), first: %.80s",
                *(len(self._cut), self._encode_prompts.limit, self._encode_prompts.max_token_length, self._cut[0]),
            )
            self._cut = []
        super().free_encoders()

    def pipeline_options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.force_zeros, "add_watermarker": False}
