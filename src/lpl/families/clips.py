"""Shared by families whose captions are encoded by CLIPs, which may be trained, and by a T5, which stays frozen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from lpl.base.terminal import quiet
from lpl.config import ModelConfig
from lpl.families.frozen_text import FrozenTextFamily, widened
from lpl.families.joint import JointModel
from lpl.families.kind import Kind
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.pipeline_family import CPU, moved
from lpl.families.sdxl_names import with_text

LONG = "long_embeds"
"""The field of the T5's hidden states, next to the tokens for trained CLIPs."""


def fields(kind: Kind) -> list[str]:
    """Names of the fields with tokens for trained CLIPs: input_ids, input_ids_2."""
    return [part.replace("text_encoder", "input_ids") for part in kind.trained_text]


class CLIPJointModel(JointModel):
    """A transformer with its CLIPs before it; all their layers affect the output.

    Args:
        family: the family's Model or Plan, whose `denoise` and `read` it runs.
        clips: in their order in a pipeline.
    """

    transformer: Any

    def __init__(self, family: CLIPFamily | CLIPBlueprint, transformer: Any, clips: Sequence[Any]) -> None:
        super().__init__({"transformer": transformer} | dict(zip(family.kind.trained_text, clips, strict=True)), {})
        self._fields, self._denoise, self._read = fields(family.kind), family.denoise, family.read
        self._width = int(transformer.config.joint_attention_dim)

    def forward(self, noisy_latents: Tensor, levels: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The transformer's output, (B, C, h, w), for captions given as tokens and as the T5's hidden states."""
        output: Tensor = self._denoise(self.transformer, noisy_latents, levels, self.encode(text), {})
        return output

    def encode(self, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _, *clips = self.parts
        long = text[LONG].float() if LONG in text else None  # in half precision small gradients of CLIPs would be lost
        return self._read(clips, [text[name].long() for name in self._fields], long, self._width)


class CLIPFamily(FrozenTextFamily):
    """A FrozenTextFamily whose CLIPs are trained where --train_text_encoder is given; its T5 never is.

    Then tokens for the CLIPs, (B, 77), and the T5's hidden states are cached of a caption.
    """

    denoise: Callable[..., Tensor]
    read: Callable[[Sequence[Any], Sequence[Tensor], Tensor | None, int], dict[str, Tensor]]
    """The denoiser's inputs from the CLIPs, their tokens, the T5's hidden states (None: a model without a T5), and the
    width of these."""

    @abstractmethod
    def embed_long(self, captions: list[str]) -> Tensor | None:
        """The T5's hidden states, (B, length, W), on the device; None: the model has no T5."""

    def prepare_text(self) -> None:
        self.trains_text = self.config.train_text_encoder
        self._width = int(self.kind.plan_configs(self.config)["transformer"]["joint_attention_dim"])
        super().prepare_text()
        if self.trains_text:
            clips = [encoder.float() for encoder in self._clips]
            self.lora_targets = with_text(self.lora_targets)
            if self.denoiser is not None:  # lpl cache loads none
                self.denoiser = CLIPJointModel(self, self.denoiser, clips)

    @property
    def _clips(self) -> list[Any]:
        return [getattr(self.pipeline, part) for part in self.kind.trained_text]

    def _tokens(self, captions: list[str]) -> list[Tensor]:
        """Token ids (B, length) for each CLIP."""
        found = []
        for name, _ in zip(self.kind.tokenizers, self._clips, strict=False):
            tokenizer, texts = getattr(self.pipeline, name), captions
            if isinstance(self.pipeline, TextualInversionLoaderMixin):  # embeddings of several tokens, as in diffusers
                texts = self.pipeline.maybe_convert_prompt(captions, tokenizer)
            limit = tokenizer.model_max_length
            own = tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            found.append(own.input_ids)
        return found

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        ids, long = self._tokens(captions), self.embed_long(captions)
        if self.trains_text:
            named = {name: own.int() for name, own in zip(fields(self.kind), ids, strict=True)}
            return named if long is None else named | {LONG: long}
        return self.read(self._clips, [own.to(self.device) for own in ids], long, self._width)

    def prepare_prompt(self, prompt: str, negative_prompt: str = "") -> None:
        if not self.trains_text:
            super().prepare_prompt(prompt, negative_prompt)
            return
        with torch.no_grad(), quiet(type(self.pipeline).__module__):
            found = self.embed([prompt, negative_prompt])
        self._prompts[prompt, negative_prompt] = {name: moved(widened(value), CPU) for name, value in found.items()}

    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        if joint is None:
            return super().encode_prompt(prompt, negative_prompt)
        prepared: Mapping[str, Any] = self._prompts[prompt, negative_prompt]
        found = joint.encode({name: value.to(self.device) for name, value in prepared.items()})
        wanted = {name: value[:1] for name, value in found.items()}
        return wanted | {f"negative_{name}": value[1:] for name, value in found.items()}


class CLIPBlueprint(PipelineBlueprint):
    """Networks of such a family with random weights."""

    denoise: Callable[..., Tensor]
    read: Callable[..., dict[str, Tensor]]

    def __init__(self, configs: Mapping[str, Any], config: ModelConfig) -> None:
        super().__init__(configs, config)
        self.trains_text = config.train_text_encoder
        if self.trains_text:
            self.lora_targets = with_text(self.lora_targets)

    @abstractmethod
    def embeds(self, batch: int) -> dict[str, Tensor]:
        """What `read` gives for `batch` captions."""

    @abstractmethod
    def long(self, batch: int) -> Tensor | None:
        """What CLIPFamily.embed_long gives for `batch` captions."""

    def denoiser(self) -> Any:
        transformer = super().denoiser()
        if not self.trains_text:
            return transformer
        clips = [encoder.float() for encoder in self.text_encoders()[: self.trained_encoders]]
        return CLIPJointModel(self, transformer, clips)

    def text(self, batch: int) -> dict[str, Tensor]:
        if not self.trains_text:
            return self.embeds(batch)
        ids, long = self.tokens(batch), self.long(batch)
        named = {name: own.int() for name, own in zip(fields(self.kind), ids, strict=False)}
        return named if long is None else named | {LONG: long}
