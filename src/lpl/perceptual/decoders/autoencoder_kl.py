"""The walk through AutoencoderKL (SD, SDXL, SD3, Flux): post_quant_conv, conv_in, middle block, up blocks."""

import copy
from typing import Any

import torch
from torch import Tensor

from lpl.perceptual.decoders.base import DecoderTaps, Tap


class AutoencoderKLTaps(DecoderTaps):
    """Taps of diffusers' AutoencoderKL: "mid", "up_0", "up_1", ... .

    Features are what `vae.decode` computes, post_quant_conv included where the VAE has one (feeding the decoder's
    conv_in directly would give the features of another latent).

    Args:
        vae: an AutoencoderKL, in eval mode.
    """

    def __init__(self, vae: Any) -> None:
        self._post_quant_conv = vae.post_quant_conv
        self._decoder = vae.decoder
        self._latent_channels = int(vae.config.latent_channels)
        widths = list(reversed(vae.config.block_out_channels))
        strides = [2 ** (len(widths) - 1 - i) for i in range(len(widths))]
        up = [Tap(f"up_{i}", width, strides[min(i + 1, len(widths) - 1)]) for i, width in enumerate(widths)]
        self.taps = (Tap("mid", widths[0], strides[0]), *up)

    @property
    def latent_channels(self) -> int:
        return self._latent_channels

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in (self._post_quant_conv, self._decoder) if m is not None]

    def copy_to(self, dtype: torch.dtype) -> "AutoencoderKLTaps":
        other = copy.copy(self)
        other._post_quant_conv = copy.deepcopy(self._post_quant_conv)
        other._decoder = copy.deepcopy(self._decoder)
        for module in other.modules():
            module.to(dtype)
        return other

    def begin(self, raw_latents: Tensor) -> Tensor:
        x = raw_latents if self._post_quant_conv is None else self._post_quant_conv(raw_latents)
        return self._decoder.conv_in(x)

    def run(self, stage: int, x: Tensor) -> Tensor:
        return self._decoder.mid_block(x) if stage == 0 else self._decoder.up_blocks[stage - 1](x)

    def finish(self, x: Tensor) -> Tensor:
        decoder = self._decoder
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
