"""SDXL's text encoding, for captions of one chunk of tokens, as in diffusers' pipeline, or of several."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpl.families.base import config_settings, tokenizer_settings

TOKENS_PER_CHUNK = 75
"""Tokens of a chunk without its start and end: the unit of --max_token_length."""


class PromptEncoder:
    """Both text encoders of a StableDiffusionXLPipeline, whose hidden states are concatenated.

    One chunk is StableDiffusionXLPipeline.encode_prompt. For several, the tokens are cut into chunks, each is given its
    own start, end and padding and is encoded on its own, and hidden states are joined along the sequence, as A1111 and
    ComfyUI do; the pooled embedding is the first chunk's. Every caption has all the chunks, the last ones empty.

    Differs from diffusers: with clip_skip, the pipeline still uses the usual layer for negative prompts; here the layer
    is the same for every text, as in A1111 and ComfyUI.

    Args:
        pipeline: the owner of the tokenizers and text encoders.
        clip_skip: layers before the usual one, which is the second to last; None is 0.
        max_token_length: 75 times the number of chunks. With tokenizers of other lengths than SDXL's 77, a chunk has
            model_max_length - 2 tokens, and there are as many chunks as with 77.
    """

    def __init__(self, pipeline: Any, clip_skip: int | None = None, max_token_length: int = TOKENS_PER_CHUNK) -> None:
        self._pipeline = pipeline
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            # Silences a warning that a long caption cannot be encoded: it is encoded chunk by chunk, or cut.
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.max_token_length = max_token_length
        self.layer = usual_layer(clip_skip)
        self.chunks = max_token_length // TOKENS_PER_CHUNK

    @property
    def settings(self) -> str:
        """All that embeddings depend on besides weights: configs, tokenizers, layer and chunks."""
        encoders = self._pipeline.text_encoder, self._pipeline.text_encoder_2
        configs = [config_settings(encoder.config.to_dict()) for encoder in encoders]
        return json.dumps([configs, self.layer, self.token_settings])

    @property
    def limit(self) -> int:
        """How many tokens of a caption count."""
        return self.chunks * _chunk_size(self._pipeline.tokenizer)

    @property
    def token_settings(self) -> str:
        """All that token ids depend on: the complete tokenizers, and the number of chunks."""
        settings: list[Any] = ["tokens", self.chunks]
        settings += map(tokenizer_settings, (self._pipeline.tokenizer, self._pipeline.tokenizer_2))
        return json.dumps(settings, sort_keys=True)

    def entry_bytes(self, of_tokens: bool = False) -> int:
        """Bytes of __call__'s result for one caption, in float32, or of its tokens and the mark of an empty one."""
        encoders = self._pipeline.text_encoder.config, self._pipeline.text_encoder_2.config
        length = self.chunks * int(self._pipeline.tokenizer.model_max_length)
        if of_tokens:
            return 4 * (2 * length + 1)
        return 4 * (length * sum(c.hidden_size for c in encoders) + int(encoders[1].projection_dim))

    def cut(self, captions: list[str]) -> list[str]:
        """The captions that have more tokens than count."""
        tokens = self._tokens(self._pipeline.tokenizer, captions)
        return [caption for caption, ids in zip(captions, tokens, strict=True) if len(ids) > self.limit]

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids for each encoder, (B, chunks, length); each chunk has its own start, end and padding."""
        first, second = (self._ids(t, captions) for t in (self._pipeline.tokenizer, self._pipeline.tokenizer_2))
        return first, second

    @torch.no_grad()
    def __call__(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states (B, chunks * length, C) and pooled embedding (B, P) on the device, in the encoders' dtype."""
        ids, ids_2 = (ids.to(device) for ids in self.tokens(captions))
        return embed(self._pipeline.text_encoder, self._pipeline.text_encoder_2, ids, ids_2, self.layer)

    def _ids(self, tokenizer: Any, captions: list[str]) -> Tensor:
        size, tokens = _chunk_size(tokenizer), self._tokens(tokenizer, captions)
        chunks = []
        for start in range(0, self.chunks * size, size):
            rows = [[tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id] for ids in tokens]
            padded = tokenizer.pad({"input_ids": rows}, padding="max_length", max_length=size + 2, return_tensors="pt")
            chunks.append(padded.input_ids)
        return torch.stack(chunks, 1)

    def _tokens(self, tokenizer: Any, captions: list[str]) -> Any:
        texts = self._pipeline.maybe_convert_prompt(captions, tokenizer)  # embeddings of several tokens, as diffusers
        return tokenizer(texts, add_special_tokens=False).input_ids


def usual_layer(clip_skip: int | None) -> int:
    """Index of the hidden states that are used; -1 is the last."""
    return -2 - (clip_skip or 0)


def embed(text_encoder: Any, text_encoder_2: Any, ids: Tensor, ids_2: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Hidden states (B, chunks * length, C) and pooled embedding (B, P) of token ids.

    Args:
        ids: (B, chunks, length), as PromptEncoder.tokens gives them.
    """
    first, _ = _embed(text_encoder, ids, layer)
    second, pooled = _embed(text_encoder_2, ids_2, layer)
    return torch.cat([first, second], 2), pooled


def guided(
    prompt: str, negative: str, encode: Callable[[str], tuple[Tensor, Tensor]], force_zeros: bool
) -> tuple[Tensor, ...]:
    """Embeddings of a prompt and a negative prompt ("": zeros with force_zeros), and the pooled ones of both."""
    embeds, pooled = encode(prompt)
    if force_zeros and negative == "":
        return embeds, torch.zeros_like(embeds), pooled, torch.zeros_like(pooled)
    negative_embeds, negative_pooled = encode(negative)
    return embeds, negative_embeds, pooled, negative_pooled


def _embed(encoder: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Hidden states of all chunks, and the encoder's own output for the first chunk (the second one's: pooled)."""
    hidden, results = [], []
    # Chunk by chunk: results do not depend on the number of chunks, and memory hardly grows with it.
    for chunk in ids.unbind(1):
        output = encoder(chunk, output_hidden_states=True)
        hidden.append(output.hidden_states[layer])
        results.append(output[0])
    return torch.cat(hidden, 1), results[0]


def _chunk_size(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length) - 2
