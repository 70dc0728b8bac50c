"""SDXL's text encoding, for captions of one chunk of tokens as diffusers' pipeline does it, and of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS_PER_CHUNK = 75
"""Tokens of a chunk, less its start and end: what --max_token_length counts in."""


class PromptEncoder:
    """Both text encoders of a StableDiffusionXLPipeline, side by side.

    One chunk is StableDiffusionXLPipeline.encode_prompt. For several, the tokens are cut into chunks, each is given its
    own start, end and padding and is encoded on its own, and hidden states are joined along the sequence, as A1111 and
    ComfyUI do; the pooled embedding is the first chunk's. Every caption has all the chunks, the last ones empty.

    Differs from diffusers: with clip_skip, the pipeline takes the negative prompt's usual layer; here every text's
    layer is the same, as in A1111 and ComfyUI.

    Args:
        pipeline: whose tokenizers and text encoders these are.
        clip_skip: layers before the usual one, which is the last but one; None is 0.
        max_token_length: 75, or so many times it as there are chunks. With tokenizers of other lengths than SDXL's 77,
            a chunk has model_max_length - 2 tokens, and there are as many chunks as with 77.
    """

    def __init__(self, pipeline: Any, clip_skip: int | None = None, max_token_length: int = TOKENS_PER_CHUNK) -> None:
        self._pipeline = pipeline
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            # It would say of every long caption that it cannot be encoded: it can, chunk by chunk, or is cut.
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.max_token_length = max_token_length
        self._layer = -2 - (clip_skip or 0)
        self._chunks = max_token_length // TOKENS_PER_CHUNK

    @property
    def settings(self) -> str:
        """Names the layer and the chunks; empty for the usual ones, so that caches of such runs stay valid."""
        usual = self._layer == -2 and self._chunks == 1
        return "" if usual else f"layer {self._layer}, {self._chunks} chunks"

    @property
    def limit(self) -> int:
        """How many tokens of a caption count."""
        return self._chunks * _chunk_size(self._pipeline.tokenizer)

    @property
    def entry_bytes(self) -> int:
        """Bytes of what __call__ gives for one caption, in float32."""
        encoders = self._pipeline.text_encoder.config, self._pipeline.text_encoder_2.config
        length = self._chunks * int(self._pipeline.tokenizer.model_max_length)
        return 4 * (length * sum(c.hidden_size for c in encoders) + int(encoders[1].projection_dim))

    def cut(self, captions: list[str]) -> list[str]:
        """The captions that have more tokens than count."""
        tokens = self._tokens(self._pipeline.tokenizer, captions)
        return [caption for caption, ids in zip(captions, tokens, strict=True) if len(ids) > self.limit]

    @torch.no_grad()
    def __call__(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states (B, chunks * length, C) and pooled embedding (B, P) on the device, in the encoders' dtype."""
        pipeline = self._pipeline
        first, _ = self._encode(pipeline.tokenizer, pipeline.text_encoder, captions, device)
        second, pooled = self._encode(pipeline.tokenizer_2, pipeline.text_encoder_2, captions, device)
        return torch.cat([first, second], 2), pooled

    def _encode(self, tokenizer: Any, encoder: Any, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states of all chunks, and of the first chunk what the encoder is for (pooled, of the second one)."""
        hidden, results = [], []
        # Chunk by chunk: numbers do not depend on how many there are, and memory hardly grows with them.
        for ids in self._ids(tokenizer, captions):
            output = encoder(ids.to(device), output_hidden_states=True)
            hidden.append(output.hidden_states[self._layer])
            results.append(output[0])
        return torch.cat(hidden, 1), results[0]

    def _ids(self, tokenizer: Any, captions: list[str]) -> list[Tensor]:
        """Token ids (B, length) of each chunk."""
        size, tokens = _chunk_size(tokenizer), self._tokens(tokenizer, captions)
        chunks = []
        for start in range(0, self._chunks * size, size):
            rows = [[tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id] for ids in tokens]
            padded = tokenizer.pad({"input_ids": rows}, padding="max_length", max_length=size + 2, return_tensors="pt")
            chunks.append(padded.input_ids)
        return chunks

    def _tokens(self, tokenizer: Any, captions: list[str]) -> Any:
        texts = self._pipeline.maybe_convert_prompt(captions, tokenizer)  # embeddings of several tokens, as diffusers
        return tokenizer(texts, add_special_tokens=False).input_ids


def _chunk_size(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length) - 2
