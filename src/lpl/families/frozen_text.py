"""Shared by families with large text encoders, which stay frozen, in the precision of their files."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lpl.base.terminal import quiet
from lpl.families.base import config_settings, tokenizer_settings, weights_hash
from lpl.families.joint import JointModel
from lpl.families.pipeline_family import CPU, PipelineFamily, moved

LENGTH_STEP = 32
"""Lengths of text are rounded up to a multiple of this, so that the cache has few shapes."""


class FrozenTextFamily(PipelineFamily):
    """A PipelineFamily whose text encoders stay frozen, in the precision that they are stored in.

    Fields of a caption are named as the arguments of the pipeline's call.
    """

    mask: str | None = None
    """The field that marks the tokens that count, always the first ones; None: all count."""
    chat: ClassVar[Mapping[str, Any] | None] = None
    """Further arguments of the tokenizer's chat template; None: captions are read without a template."""
    max_length: int
    """Maximum number of tokens of a caption, for the encoder that reads the longest captions."""

    @abstractmethod
    def embed(self, captions: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """The pipeline's embeddings of captions, (B, ...) each or B tensors, on the device."""

    @property
    def text_encoders(self) -> list[Any]:
        found = [getattr(self.pipeline, part) for part in self.kind.networks if part.startswith("text_encoder")]
        return [encoder for encoder in found if encoder is not None]

    @property
    def _tokenizers(self) -> list[Any]:
        return [found for part in self.kind.tokenizers if (found := getattr(self.pipeline, part)) is not None]

    def prepare_text(self) -> None:
        for encoder in self.text_encoders:
            encoder.eval().requires_grad_(False)
        for tokenizer in self._tokenizers:
            # Silences a warning that a long caption cannot be encoded: it is cut, which is logged once.
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        configs = [config_settings(encoder.config.to_dict()) for encoder in self.frozen_encoders]
        settings = [configs, [tokenizer_settings(tokenizer) for tokenizer in self._tokenizers], self.max_length]
        if self.trains_text:
            settings.append("tokens")
        self.text_key = weights_hash(*self.frozen_encoders, settings=json.dumps(settings), large=True)
        self._cut: list[str] = []

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor | list[Tensor]]:
        lengths = self.lengths(captions)
        self._cut += [text for text, length in zip(captions, lengths, strict=True) if length > self.limit]
        with quiet(type(self.pipeline).__module__):
            found = {name: moved(value, CPU) for name, value in self.embed(captions).items()}
        if self.mask is None:
            return found
        counted = [-(-int(row.sum()) // LENGTH_STEP) * LENGTH_STEP for row in found[self.mask]]
        return {name: [row[:n] for row, n in zip(value, counted, strict=True)] for name, value in found.items()}

    def lengths(self, captions: list[str]) -> list[int]:
        """Numbers of tokens of captions by the last tokenizer, before any cut."""
        tokenizer, texts = self._tokenizers[-1], captions
        if self.chat is not None:
            chats = [[{"role": "user", "content": caption}] for caption in captions]
            texts = [tokenizer.apply_chat_template(chat, tokenize=False, **self.chat) for chat in chats]
        return [len(ids) for ids in tokenizer(texts).input_ids]

    @property
    def limit(self) -> int:
        """Maximum number of tokens of the last tokenizer that count."""
        return self.max_length

    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        # In float32: pipelines draw in the precision of their text.
        with torch.no_grad(), quiet(type(self.pipeline).__module__):
            found = {name: widened(value) for name, value in self.embed([prompt, negative_prompt]).items()}
        wanted = {name: value[:1] for name, value in found.items()}
        return wanted | {f"negative_{name}": value[1:] for name, value in found.items()}

    def text_bytes(self) -> int:
        with torch.no_grad():
            return 4 * sum(value[0].numel() for value in self.embed([""]).values())

    def free_encoders(self) -> None:
        self.say_cut(self._cut, self.limit)
        self._cut = []
        super().free_encoders()


class OwnLengthFamily(FrozenTextFamily):
    """A FrozenTextFamily whose denoiser reads only a caption's own tokens, without padding.

    Fields: prompt_embeds, padded with zeros to a multiple of LENGTH_STEP, and lengths. Captions are encoded one by one:
    in a batch the shorter ones cost as much as the longest.
    """

    @abstractmethod
    def embed_one(self, caption: str) -> Tensor:
        """The pipeline's embedding of a caption, (tokens, W), on the device."""

    def embed(self, captions: list[str]) -> dict[str, Tensor | list[Tensor]]:
        rows = [self.embed_one(caption) for caption in captions]
        filled = [nn.functional.pad(row, (0, 0, 0, -len(row) % LENGTH_STEP)) for row in rows]
        return {"prompt_embeds": filled, "lengths": torch.tensor([len(row) for row in rows])}

    def prompt_row(self, prompt: str) -> Tensor:
        """The tokens (n, W) of a prompt, in float32, on the CPU."""
        found = self.encode_text([prompt])
        return found["prompt_embeds"][0][: int(found["lengths"][0])].float()

    def text_bytes(self) -> int:
        return 2 * 128 * int(self.text_encoders[0].config.get_text_config().hidden_size)  # of usual captions; two bytes


def trimmed(embeds: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, n, W) up to the longest of these lengths, and which of them count, (B, n); None: all do."""
    longest = max(lengths)
    mask = None if min(lengths) == longest else torch.arange(longest) < torch.tensor(lengths)[:, None]
    return embeds[:, :longest], None if mask is None else mask.to(embeds.device, non_blocking=True)


def widened(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Floating-point values in float32; integers stay as they are."""
    return moved(value, torch.float32) if value[0].is_floating_point() else value
