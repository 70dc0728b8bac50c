"""Walks through diffusers' decoders of images that run as plain blocks."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.decoders.base import Tap, VaeTaps
from lpl.perceptual.feature_maps import State


class TinyTaps(VaeTaps):
    """AutoencoderTiny: the maps before each upsampling, and the last block's."""

    parts = ("layers",)

    def _pieces(self) -> list[nn.Sequential]:
        """The layers, cut before each upsampling; the convolution to the image is left out."""
        layers = list(self.decoder.layers)
        cuts = [0, *(i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)), len(layers) - 1]
        return [nn.Sequential(*layers[first:last]) for first, last in pairwise(cuts)]

    def stages(self) -> Sequence[Callable[..., State]]:
        return self._pieces()

    def begin(self, raw_latents: Tensor) -> State:
        return torch.tanh(raw_latents / 3) * 3

    def finish(self, x: Any) -> Tensor:
        return self.decoder.layers[-1](x).mul(2).sub(1)


class DCTaps(VaeTaps):
    """AutoencoderDC, which has no middle block: taps start at the lowest level; levels without blocks have none."""

    parts = ("conv_in", "up_blocks", "norm_out", "in_shortcut")

    def stages(self) -> Sequence[Callable[..., State]]:
        return [block for block in reversed(self.decoder.up_blocks) if len(block)]

    def begin(self, raw_latents: Tensor) -> State:
        x = self.decoder.conv_in(raw_latents)
        if self.decoder.in_shortcut:
            x = x + raw_latents.repeat_interleave(self.decoder.in_shortcut_repeats, dim=1)
        return x

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        return decoder.conv_out(decoder.conv_act(decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1)))


class KVAETaps(VaeTaps):
    """AutoencoderKLKVAE: every block reads the latents too, which are carried along with the map."""

    parts = ("conv_in", "mid", "up", "num_resolutions")
    channels_key = "z_channels"

    def stages(self) -> Sequence[Callable[..., State]]:
        return [
            self._middle,
            *(lambda x, n=n: self._level(n, x) for n in reversed(range(self.decoder.num_resolutions))),
        ]

    def begin(self, raw_latents: Tensor) -> State:
        return self.decoder.conv_in(raw_latents), raw_latents

    def _middle(self, state: Any) -> State:
        x, z = state
        middle = self.decoder.mid
        return middle.block_2(middle.block_1(x, None, z), None, z), z

    def _level(self, number: int, state: Any) -> State:
        x, z = state
        level = self.decoder.up[number]
        for i in range(self.decoder.num_res_blocks + 1):
            x = level.block[i](x, None, z)
            if len(level.attn) > 0:
                x = level.attn[i](x, z)
        return (x if number == 0 else level.upsample(x)), z

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(*x)))


class RAETaps(VaeTaps):
    """AutoencoderRAE: a tap per transformer layer; the class token is carried along with the grid of patches.

    Model space is what `decode` takes: it scales latents itself.
    """

    parts = ("decoder_embed", "decoder_layers", "trainable_cls_token")
    channels_key = "encoder_hidden_size"

    def check(self) -> None:
        if not self._vae.reshape_to_2d:
            self.refuse("its latents are no grid (reshape_to_2d is off)")

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace.identity()

    def measure(self, cells: int = 2) -> tuple[Tap, ...]:
        taps = super().measure(int(self.decoder.num_patches**0.5))
        return tuple(tap._replace(name=f"layer_{i}") for i, tap in enumerate(taps))

    def stages(self) -> Sequence[Callable[..., State]]:
        return [lambda state, layer=layer: _patches(layer(_tokens(state))) for layer in self.decoder.decoder_layers]

    def begin(self, raw_latents: Tensor) -> State:
        vae, decoder = self._vae, self.decoder
        if vae.config.scaling_factor != 1:
            raw_latents = raw_latents / vae.config.scaling_factor
        z = vae._denormalize_latents(raw_latents)
        x = decoder.interpolate_latent(decoder.decoder_embed(z.flatten(2).transpose(1, 2)))
        x = torch.cat([decoder.trainable_cls_token.expand(len(x), -1, -1), x], 1)
        return _patches(x + decoder.decoder_pos_embed.to(x.device, x.dtype))

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        patches = decoder.decoder_pred(decoder.decoder_norm(_tokens(x)))[:, 1:]
        return self._vae._denormalize_image(decoder.unpatchify(patches))


def _patches(tokens: Tensor) -> State:
    """(B, 1 + n * n, C) as the grid (B, C, n, n) and the class token (B, 1, C)."""
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)), tokens[:, :1]


def _tokens(state: Any) -> Tensor:
    patches, token = state
    return torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)
