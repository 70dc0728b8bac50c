"""Walks through diffusers' decoders of videos that run as plain blocks: (B, C, T, h, w) to (B, C, T', H, W)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.decoders.base import VaeTaps
from lpl.perceptual.feature_maps import State


class VideoTaps(VaeTaps):
    """AutoencoderKLHunyuanVideo and similar VAEs."""

    frames = True
    axes = (2, 3)

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))


class HunyuanVideo15Taps(VideoTaps):
    """AutoencoderKLHunyuanVideo15, AutoencoderKLHunyuanImageRefiner.

    The middle block runs sample by sample: its attention's mask does not fit several.
    """

    parts = ("conv_in", "mid_block", "up_blocks", "repeat")

    def stages(self) -> Sequence[Callable[..., State]]:
        middle = self.decoder.mid_block
        return [lambda x: torch.cat([middle(sample) for sample in x.split(1)]), *self.decoder.up_blocks]

    def begin(self, raw_latents: Tensor) -> State:
        z = self.quantised(raw_latents)
        return self.decoder.conv_in(z) + z.repeat_interleave(self.decoder.repeat, dim=1)

    def finish(self, x: Any) -> Tensor:
        return self.decoder.conv_out(self.decoder.conv_act(self.decoder.norm_out(x)))


class CosmosTaps(VideoTaps):
    """AutoencoderKLCosmos; model space depends on the scheduler's sigma_data."""

    parts = (*VideoTaps.parts, "unpatch_embed")

    @property
    def latent_space(self) -> LatentSpace:
        raise ValueError(
            f"{type(self._vae).__name__}: its latents are scaled by the scheduler's sigma_data: pass "
            "latent_space=LatentSpace(std / sigma_data, mean), per channel"
        )

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        return decoder.unpatch_embed(decoder.conv_out(silu(decoder.norm_out(x))))


class MagvitTaps(VideoTaps):
    """AutoencoderKLMagvit, one frame only: more are decoded in pieces with separate norms."""

    max_frames = 1

    def begin(self, raw_latents: Tensor) -> State:
        self._forget()
        return super().begin(raw_latents)

    def run(self, stage: int, x: State) -> State:
        self._forget()
        return super().run(stage, x)

    def finish(self, x: Any) -> Tensor:
        self._forget()
        decoder = self.decoder
        y = decoder.conv_norm_out(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
        y = decoder.conv_out(decoder.conv_act(y))
        self._forget()
        return y

    def _forget(self) -> None:
        """Clears the frames that its convolutions keep from call to call."""
        for module in self.decoder.modules():
            if hasattr(module, "prev_features"):
                module.prev_features = None


class CogVideoXTaps(VideoTaps):
    """AutoencoderKLCogVideoX, of as many frames as it decodes at once; every block reads the latents too."""

    parts = (*VideoTaps.parts, "norm_out")

    def check(self) -> None:
        self.max_frames = 2 * self._vae.num_latent_frames_batch_size - 1

    def stages(self) -> Sequence[Callable[..., State]]:
        return [lambda state, block=block: self._block(block, state) for block in super().stages()]

    def begin(self, raw_latents: Tensor) -> State:
        z = self.quantised(raw_latents)
        return self.decoder.conv_in(z, conv_cache=None)[0], z

    def _block(self, block: Any, state: Any) -> State:
        x, z = state
        return block(x, None, z, conv_cache=None)[0], z

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        y = decoder.conv_act(decoder.norm_out(*x, conv_cache=None)[0])
        return decoder.conv_out(y, conv_cache=None)[0]


class LTXTaps(VideoTaps):
    """AutoencoderKLLTXVideo."""

    parts = (*VideoTaps.parts, "patch_size_t")

    def check(self) -> None:
        if getattr(self._vae.config, "timestep_conditioning", False):
            self.refuse("its decoder is conditioned on a timestep, which LPL has none of")
        noise = getattr(self._vae.config, "decoder_inject_noise", False)
        if any(noise if isinstance(noise, list | tuple) else [noise]):
            self.refuse("its decoder injects noise: two passes through it differ")

    def stages(self) -> Sequence[Callable[..., State]]:
        return [lambda x, block=block: block(x, None) for block in super().stages()]

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        y = decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1)
        return self._unpatchify(decoder.conv_out(decoder.conv_act(y)))

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, C * pt * p * p, T, h, w) to (B, C, T * pt, h * p, w * p)."""
        p, pt = self.decoder.patch_size, self.decoder.patch_size_t
        x = x.unflatten(1, (-1, pt, p, p)).permute(0, 1, 5, 2, 6, 4, 7, 3)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class LTX2Taps(LTXTaps):
    """AutoencoderKLLTX2Video."""

    parts = (*LTXTaps.parts, "is_causal")

    def stages(self) -> Sequence[Callable[..., State]]:
        causal = self.decoder.is_causal
        return [lambda x, block=block: block(x, None, causal=causal) for block in super(LTXTaps, self).stages()]

    def begin(self, raw_latents: Tensor) -> State:
        return self.decoder.conv_in(self.quantised(raw_latents), causal=self.decoder.is_causal)

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        y = decoder.conv_act(decoder.norm_out(x))
        return self._unpatchify(decoder.conv_out(y, causal=decoder.is_causal))


class MochiTaps(VideoTaps):
    """AutoencoderKLMochi; its last tap is the output block's. Frames that `decode` drops at the start are compared."""

    parts = ("conv_in", "block_in", "up_blocks", "block_out", "proj_out")

    def stages(self) -> Sequence[Callable[..., State]]:
        decoder = self.decoder
        blocks = [decoder.block_in, *decoder.up_blocks, decoder.block_out]
        return [lambda x, block=block: block(x)[0] for block in blocks]

    def finish(self, x: Any) -> Tensor:
        decoder, vae = self.decoder, self._vae
        y = decoder.proj_out(decoder.nonlinearity(x).movedim(1, -1)).movedim(-1, 1)
        ratio = vae.temporal_compression_ratio
        return y[:, :, ratio - 1 :] if vae.drop_last_temporal_frames and y.shape[2] >= ratio else y


class TemporalDecoderTaps(VideoTaps):
    """AutoencoderKLTemporalDecoder (Stable Video Diffusion): its blocks take frames as a batch and mix them inside."""

    parts = (*VideoTaps.parts, "time_conv_out")

    def begin(self, raw_latents: Tensor) -> State:
        z = raw_latents.unsqueeze(2) if raw_latents.dim() == 4 else raw_latents
        return self._by_frame(self.decoder.conv_in, z)

    def stages(self) -> Sequence[Callable[..., State]]:
        return [lambda x, block=block: self._block(block, x) for block in super().stages()]

    def _block(self, block: Any, x: Tensor) -> Tensor:
        videos = torch.zeros(len(x), x.shape[2], dtype=x.dtype, device=x.device)
        return self._by_frame(lambda y: block(y, image_only_indicator=videos), x)

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        y = self._by_frame(lambda y: decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(y))), x)
        return decoder.time_conv_out(y)

    @staticmethod
    def _by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of (B * T, C, H, W) on (B, C, T, H, W)."""
        y = function(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (len(x), -1)).transpose(1, 2)
