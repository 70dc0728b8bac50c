"""The walk through the causal video decoders of Qwen-Image and Wan: frame after frame, each stage over all frames."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lpl.perceptual.decoders.base import VaeTaps
from lpl.perceptual.decoders.folding import folded_block, folded_middle, upsampler_of
from lpl.perceptual.feature_maps import State, map_of
from lpl.perceptual.frozen import Fuse, Plain
from lpl.perceptual.sweep import Segment

CACHED = 2
"""Frames that a causal convolution of 3 looks back on."""


class CausalTaps(VaeTaps):
    """AutoencoderKLQwenImage, AutoencoderKLWan (2.1 and 2.2).

    One frame runs directly, without caches and with frozen operations (folding.py). With several, each block gets the
    first frame's map, then those of each further latent frame in turn, and has its own cache.
    """

    parts = ("conv_in", "mid_block", "up_blocks", "norm_out", "conv_out")
    channels_key = "z_dim"
    frames = True
    axes = (2, 3)

    def begin(self, raw_latents: Tensor) -> State:
        return self._convolve(self.decoder.conv_in, self.quantised(raw_latents), 1)

    def stages(self) -> Sequence[Callable[..., State]]:
        return [lambda x, i=i: self._block(i, x) for i in range(1 + len(self.decoder.up_blocks))]

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        y = decoder.nonlinearity(decoder.norm_out(x.unsqueeze(2) if x.dim() == 4 else x))
        y = self._convolve(decoder.conv_out, y, self._ratio(len(decoder.up_blocks)))
        patch = getattr(self._vae.config, "patch_size", None) or 1
        if patch > 1:  # (B, C * p * p, T, H, W): the phase along the width varies slowest
            y = y.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
        return y.clamp(-1, 1)

    def segments(self, fuse: Fuse) -> list[Segment]:
        """For one frame, on maps (B, C, H, W): frozen operations; a stage built otherwise runs as plain blocks."""
        blocks = [folded_block(block, fuse) for block in self.decoder.up_blocks]
        return self.frozen_segments(
            [folded_middle(self._vae, fuse), *blocks],
            lambda stage: Plain(partial(self._one_frame, stage), self.taps[stage].name),
        )

    def _one_frame(self, stage: int, x: Tensor) -> State:
        return map_of(self.run(stage, x.unsqueeze(2) if stage else self.begin(x))).squeeze(2)

    def _ratio(self, blocks: int) -> int:
        """Frames that the first `blocks` up blocks make of each latent frame after the first."""
        return 2 ** sum(
            getattr(upsampler_of(block), "mode", "") == "upsample3d" for block in self.decoder.up_blocks[:blocks]
        )

    def _block(self, stage: int, x: Any) -> Tensor:
        block = self.decoder.up_blocks[stage - 1] if stage else self.decoder.mid_block
        residual = getattr(block, "avg_shortcut", None) is not None
        if x.shape[2] == 1:
            return block(x, first_chunk=True) if residual else block(x)
        count = sum(type(m).__name__.endswith("CausalConv3d") for m in block.modules())
        cache: list[Any] = [None] * count
        parts = []
        for number, part in enumerate(_pieces(x, self._ratio(stage - 1) if stage else 1)):
            own = {"first_chunk": number == 0} if residual else {}
            parts.append(block(part, feat_cache=cache, feat_idx=[0], **own))
        return torch.cat(parts, 2)

    @staticmethod
    def _convolve(convolution: Any, x: Tensor, ratio: int) -> Tensor:
        """A causal convolution, as decode runs it."""
        if x.shape[2] == 1:
            return convolution(x)
        parts: list[Tensor] = []
        cache = None
        for part in _pieces(x, ratio):
            seen = part[:, :, -CACHED:].clone()
            if cache is not None and seen.shape[2] < CACHED:
                seen = torch.cat([cache[:, :, -1:], seen], 2)
            parts.append(convolution(part, cache))
            cache = seen
        return torch.cat(parts, 2)


class QwenImage21Taps(CausalTaps):
    """AutoencoderKLQwenImage21: images only."""

    max_frames = 1


def _pieces(x: Tensor, ratio: int) -> list[Tensor]:
    """The first frame, then the frames made of each further latent frame."""
    return [x[:, :, :1], *x[:, :, 1:].split(ratio, 2)]
