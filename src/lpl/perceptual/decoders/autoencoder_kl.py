"""The walk through AutoencoderKL (SD, SDXL, SD3, Flux): post_quant_conv, conv_in, middle block, up blocks."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lpl.perceptual.convolution import Convolution, Operation, Upsampling
from lpl.perceptual.decoders.base import DecoderTaps, Tap
from lpl.perceptual.frozen import Attention, Fuse, Identity, Plain, Resnet
from lpl.perceptual.sweep import Segment

logger = logging.getLogger("lpl")


class AutoencoderKLTaps(DecoderTaps):
    """Taps of diffusers' AutoencoderKL: "mid", "up_0", "up_1", ... .

    Features are what `vae.decode` computes, post_quant_conv included where the VAE has one (feeding the decoder's
    conv_in directly would give the features of another latent).

    Args:
        vae: an AutoencoderKL, in eval mode.

    Raises:
        ValueError: another library's class of that name.
    """

    def __init__(self, vae: Any) -> None:
        if not hasattr(vae, "config") or not hasattr(vae.decoder, "up_blocks"):
            raise ValueError(
                f"{type(vae).__module__}.{type(vae).__name__} is not diffusers' AutoencoderKL, which is walked"
            )
        self._post_quant_conv = vae.post_quant_conv
        self._decoder = vae.decoder
        self.latent_channels = int(vae.config.latent_channels)
        widths = list(reversed(vae.config.block_out_channels))
        strides = [2 ** (len(widths) - 1 - i) for i in range(len(widths))]
        up = [Tap(f"up_{i}", width, strides[min(i + 1, len(widths) - 1)]) for i, width in enumerate(widths)]
        self.taps = (Tap("mid", widths[0], strides[0]), *up)

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

    def segments(self, fuse: Fuse) -> list[Segment]:
        """Frozen operations; a stage of another build than SDXL's runs as plain blocks, which the log says."""
        bodies: list[list[Operation]] = []
        heads: list[Identity | Upsampling] = []
        for stage in range(len(self.taps)):
            block = None if stage == 0 else self._decoder.up_blocks[stage - 1]
            frozen = self._frozen_middle(fuse) if block is None else _frozen_block(block, fuse)
            if frozen is None:
                logger.info("LPL: %s has no frozen operations and runs as plain blocks", self.taps[stage].name)
                frozen = [self.plain(stage)], Identity()
            bodies.append(frozen[0])
            heads.append(frozen[1])
        return [Segment(head, body) for head, body in zip([Identity(), *heads], [*bodies, []], strict=True)]

    def _frozen_middle(self, fuse: Fuse) -> tuple[list[Operation], Identity | Upsampling] | None:
        decoder, middle = self._decoder, self._decoder.mid_block
        convolutions = [m for m in (self._post_quant_conv, decoder.conv_in) if m is not None]
        if not all(map(_is_plain, convolutions)) or not all(map(_is_resnet, middle.resnets)):
            return None
        operations: list[Operation] = [*map(Convolution, convolutions), Resnet(middle.resnets[0], fuse)]
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                operations.append(Attention(attention, fuse) if _is_attention(attention) else Plain(attention))
            operations.append(Resnet(resnet, fuse))
        return operations, Identity()


def _frozen_block(block: Any, fuse: Fuse) -> tuple[list[Operation], Identity | Upsampling] | None:
    upsamplers = list(block.upsamplers or [])
    known = type(block).__name__ == "UpDecoderBlock2D" and all(map(_is_resnet, block.resnets))
    if not known or len(upsamplers) > 1 or not all(map(_is_upsampling, upsamplers)):
        return None
    head = Upsampling(upsamplers[0].conv) if upsamplers else Identity()
    return [Resnet(resnet, fuse) for resnet in block.resnets], head


def _is_plain(module: Any) -> bool:
    """A convolution of stride 1 and odd size that keeps the map's size."""
    return (
        type(module) is nn.Conv2d
        and module.padding == tuple(k // 2 for k in module.kernel_size)
        and module.kernel_size[0] == module.kernel_size[1] in (1, 3)
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def _is_resnet(module: Any) -> bool:
    return (
        type(module).__name__ == "ResnetBlock2D"
        and module.upsample is module.downsample is module.time_emb_proj is None
        and module.time_embedding_norm in ("default", "group")
        and module.output_scale_factor == 1
        and isinstance(module.nonlinearity, nn.SiLU)
        and type(module.norm1) is type(module.norm2) is nn.GroupNorm
        and all(map(_is_plain, [module.conv1, module.conv2]))
        and (module.conv_shortcut is None or _is_plain(module.conv_shortcut))
    )


def _is_attention(module: Any) -> bool:
    return (
        type(module).__name__ == "Attention"
        and type(module.processor).__name__ == "AttnProcessor2_0"
        and type(module.group_norm) is nn.GroupNorm
        and module.spatial_norm is module.norm_q is module.norm_k is module.norm_cross is None
        and module.residual_connection
        and module.rescale_output_factor == 1
        and all(type(m) is nn.Linear for m in (module.to_q, module.to_k, module.to_v, module.to_out[0]))
    )


def _is_upsampling(module: Any) -> bool:
    return (
        type(module).__name__ == "Upsample2D"
        and module.use_conv and module.interpolate and module.norm is None and module.name == "conv"
        and _is_plain(module.conv)
        and module.conv.kernel_size == (3, 3)
    )  # fmt: skip
