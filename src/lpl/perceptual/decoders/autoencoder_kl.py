"""The walk through AutoencoderKL and similar VAEs: post_quant_conv, conv_in, middle block, up blocks."""

from typing import Any, cast

from torch import Tensor

from lpl.perceptual.convolution import Convolution, Head, Operation
from lpl.perceptual.decoders.base import Tap, VaeTaps
from lpl.perceptual.decoders.blocks import frozen_attention, frozen_block, is_plain, is_resnet
from lpl.perceptual.feature_maps import State
from lpl.perceptual.frozen import Fuse, Identity, Resnet
from lpl.perceptual.sweep import Segment


class AutoencoderKLTaps(VaeTaps):
    """AutoencoderKL (SD, SDXL, SD3, Flux.1), AutoencoderKLFlux2, and AsymmetricAutoencoderKL without image and mask.

    Features are what `vae.decode` computes, post_quant_conv included where the VAE has one (feeding the decoder's
    conv_in directly would give the features of another latent). Taps: "mid", "up_0", "up_1", ... .
    """

    parts = (*VaeTaps.parts, "conv_norm_out", "conv_out")
    croppable = True

    def measure(self, cells: int = 2) -> tuple[Tap, ...]:
        """Widths and strides, without decoding."""
        blocks = list(self.decoder.up_blocks)
        doubled = [bool(getattr(block, "upsamplers", None)) for block in blocks]
        up = [
            Tap(f"up_{i}", block.resnets[-1].conv2.out_channels, 2 ** sum(doubled[i + 1 :]))
            for i, block in enumerate(blocks)
        ]
        return Tap("mid", self.decoder.conv_in.out_channels, 2 ** sum(doubled)), *up

    def begin(self, raw_latents: Tensor) -> State:
        return self.decoder.conv_in(self.quantised(raw_latents))

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))

    def segments(self, fuse: Fuse) -> list[Segment]:
        """Frozen operations; a stage built otherwise than SDXL's runs as plain blocks, and the log says so."""
        blocks = [frozen_block(block, fuse) for block in self.decoder.up_blocks]
        return self.frozen_segments([self._frozen_middle(fuse), *blocks])

    def _frozen_middle(self, fuse: Fuse) -> tuple[list[Operation], Head] | None:
        decoder, middle = self.decoder, self.decoder.mid_block
        convolutions = [m for m in (getattr(self._vae, "post_quant_conv", None), decoder.conv_in) if m is not None]
        if not all(map(is_plain, convolutions)) or not all(map(is_resnet, middle.resnets)):
            return None
        operations: list[Operation] = [*map(Convolution, convolutions), Resnet(middle.resnets[0], fuse)]
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                operations.append(frozen_attention(attention, fuse))
            operations.append(Resnet(resnet, fuse))
        return operations, Identity()


class VQTaps(AutoencoderKLTaps):
    """VQModel, with latents that are not quantised: `decode(latents, force_not_quantize=True)`.

    With norm_type "spatial" every block reads the latents too, which are carried along with the map.
    """

    def check(self) -> None:
        if self._vae.config.lookup_from_codebook:
            self.refuse("it decodes codebook entries, which have no gradient to latents")

    @property
    def _spatial(self) -> bool:
        return self._vae.config.norm_type == "spatial"

    def begin(self, raw_latents: Tensor) -> State:
        x = super().begin(raw_latents)
        return (x, raw_latents) if self._spatial and isinstance(x, Tensor) else x

    def run(self, stage: int, x: Any) -> State:
        if not self._spatial:
            return super().run(stage, x)
        features, z = x
        return cast(Tensor, self.stages()[stage](features, z)), z

    def finish(self, x: Any) -> Tensor:
        if not self._spatial:
            return super().finish(x)
        decoder = self.decoder
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(*x)))

    def segments(self, fuse: Fuse) -> list[Segment]:
        return self.plain_segments() if self._spatial else super().segments(fuse)
