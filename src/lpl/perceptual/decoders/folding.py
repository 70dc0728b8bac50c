"""One frame through a causal video decoder is a 2-D decoder: its blocks as frozen operations."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from lpl.perceptual.convolution import (
    Convolution,
    Head,
    LastSlice,
    Operation,
    Rows,
    Upsampling,
    gradient_to_input,
    rows_of,
)
from lpl.perceptual.decoders.blocks import is_plain
from lpl.perceptual.decoders.shortcuts import Duplicate, WithShortcut
from lpl.perceptual.frozen import Fuse, Identity, Plain, Resnet

DIRECT_CELLS = 512
"""Cells of a map (all samples) below which combining an upsampling's weights costs more than it saves."""


class SmallUpsampling(Upsampling):
    """Upsampling; for the small, wide maps of these decoders as two steps, doubling and a 3 x 3 convolution."""

    def rows(self, x: Tensor) -> Rows:
        return rows_of(self.forward(x, keep=False)[0]) if _is_small(x) else super().rows(x)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        if not _is_small(x):
            return super().forward(x, keep)
        return conv2d(interpolate(x, scale_factor=2.0), self.module.weight, self.module.bias, padding=1), []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        if not _is_small(grad[:, :, ::2, ::2]):
            return super().backward(saved, grad)
        return 4 * avg_pool2d(gradient_to_input(self.module.weight, grad), 2)


def _is_small(x: Tensor) -> bool:
    return x.shape[0] * x.shape[2] * x.shape[3] < DIRECT_CELLS


def folded_middle(vae: Any, fuse: Fuse) -> tuple[list[Operation], Head] | None:
    """From raw latents (B, C, h, w) to the middle block's map; None if it is built otherwise."""
    convolutions = [vae.post_quant_conv, vae.decoder.conv_in]
    block = vae.decoder.mid_block
    if not all(map(is_causal, convolutions)) or not all(map(is_causal_resnet, block.resnets)):
        return None
    first, *rest = block.resnets
    operations: list[Operation] = [Convolution(LastSlice(m)) for m in convolutions]
    operations.append(_resnet(first, fuse))
    for attention, resnet in zip(block.attentions, rest, strict=True):
        if attention is not None:
            operations.append(Plain(lambda x, attention=attention: attention(x.unsqueeze(2)).squeeze(2)))
        operations.append(_resnet(resnet, fuse))
    return operations, Identity()


def folded_block(block: Any, fuse: Fuse) -> tuple[list[Operation], Head] | None:
    """An up block's operations and the upsampling behind them; None if it is built otherwise."""
    upsampler = upsampler_of(block)
    shortcut = getattr(block, "avg_shortcut", None)
    if not all(map(is_causal_resnet, block.resnets)) or not (upsampler is None or is_doubling(upsampler)):
        return None
    resnets: list[Operation] = [_resnet(resnet, fuse) for resnet in block.resnets]
    if upsampler is None:
        return (resnets, Identity()) if shortcut is None else None
    head = SmallUpsampling(upsampler.resample[1])
    if shortcut is None:
        return resnets, head
    return [WithShortcut([*resnets, head], duplicate(shortcut))], Identity()


def duplicate(shortcut: Any) -> Duplicate:
    """The shortcut of Wan 2.2's up blocks, for one frame.

    Of C * r channels that repeat C, number ((o * t + t - 1) * s + i) * s + j is cell (i, j) of output channel o.
    """
    t, s = shortcut.factor_t, shortcut.factor_s
    repeated = torch.arange(shortcut.out_channels * t * s * s).view(-1, t, s, s)[:, -1]
    return Duplicate(shortcut.in_channels, repeated.flatten() // shortcut.repeats, s)


def upsampler_of(block: Any) -> Any:
    """An up block's upsampling, or None."""
    several = getattr(block, "upsamplers", None)
    return getattr(block, "upsampler", None) if several is None else several[0]


def _resnet(module: Any, fuse: Fuse) -> Resnet:
    shortcut = None if isinstance(module.conv_shortcut, nn.Identity) else LastSlice(module.conv_shortcut)
    first, second = LastSlice(module.conv1), LastSlice(module.conv2)
    norms = {"norm1": module.norm1, "norm2": module.norm2}
    return Resnet(SimpleNamespace(conv1=first, conv2=second, conv_shortcut=shortcut, **norms), fuse)


def is_causal(module: Any) -> bool:
    """A causal convolution of stride 1 and odd size that keeps the map's size, with zeros around it."""
    around: Any = getattr(module, "_padding", None)
    if not isinstance(module, nn.Conv3d) or around is None:
        return False
    time, height, width = module.kernel_size
    return (
        tuple(around) == (width // 2, width // 2, height // 2, height // 2, time - 1, 0)
        and height == width
        and height in (1, 3)
        and module.padding == (0, 0, 0)
        and module.stride == module.dilation == (1, 1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def is_causal_resnet(module: Any) -> bool:
    """A residual block of RMS norms over channels, SiLU and causal convolutions."""
    norms = [getattr(module, name, None) for name in ("norm1", "norm2")]
    return (
        all(getattr(norm, "channel_first", False) and hasattr(norm, "gamma") for norm in norms)
        and isinstance(module.nonlinearity, nn.SiLU)
        and is_causal(module.conv1)
        and is_causal(module.conv2)
        and (isinstance(module.conv_shortcut, nn.Identity) or is_causal(module.conv_shortcut))
    )


def is_doubling(module: Any) -> bool:
    """Nearest-neighbour doubling and a convolution of 3 x 3; in time it doubles only further frames."""
    upsample, convolution = module.resample
    factor: Any = upsample.scale_factor if isinstance(upsample, nn.Upsample) else None
    return (
        module.mode in ("upsample2d", "upsample3d")
        and factor in (2, (2, 2))
        and upsample.mode in ("nearest", "nearest-exact")
        and is_plain(convolution)
        and convolution.kernel_size == (3, 3)
    )
