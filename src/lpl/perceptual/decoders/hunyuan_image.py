"""The walk through the image decoder of HunyuanImage 2.1."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lpl.perceptual.convolution import Convolution, Operation
from lpl.perceptual.decoders.base import VaeTaps
from lpl.perceptual.decoders.blocks import is_plain
from lpl.perceptual.decoders.shortcuts import Duplicate, WithShortcut
from lpl.perceptual.feature_maps import State
from lpl.perceptual.frozen import Attention, Fuse, Identity, Resnet
from lpl.perceptual.sweep import Segment


class HunyuanImageTaps(VaeTaps):
    """AutoencoderKLHunyuanImage: a tap before each upsampling and after the last block."""

    parts = ("conv_in", "mid_block", "up_blocks", "repeat")

    def _levels(self) -> list[list[Any]]:
        """The blocks behind the middle one, cut before each upsampling."""
        levels: list[list[Any]] = [[]]
        for block in self.decoder.up_blocks:
            if "Upsample" in type(block).__name__:
                levels.append([])
            levels[-1].append(block)
        return levels

    def stages(self) -> Sequence[Callable[..., State]]:
        return [self.decoder.mid_block, *(nn.Sequential(*level) for level in self._levels())]

    def begin(self, raw_latents: Tensor) -> State:
        return self.decoder.conv_in(raw_latents) + raw_latents.repeat_interleave(self.decoder.repeat, dim=1)

    def finish(self, x: Any) -> Tensor:
        decoder = self.decoder
        return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))

    def segments(self, fuse: Fuse) -> list[Segment]:
        """Frozen operations; a stage that is built otherwise runs as plain blocks, and the log says so."""
        found = [self._middle(fuse), *(_level(level, fuse) for level in self._levels())]
        return self.frozen_segments([None if operations is None else (operations, Identity()) for operations in found])

    def _middle(self, fuse: Fuse) -> list[Operation] | None:
        convolution, block = self.decoder.conv_in, self.decoder.mid_block
        if not is_plain(convolution) or not all(map(_is_resnet, block.resnets)):
            return None
        channels, repeat = convolution.in_channels, self.decoder.repeat
        around = Duplicate(channels, torch.arange(channels).repeat_interleave(repeat))
        operations: list[Operation] = [WithShortcut([Convolution(convolution)], around), Resnet(block.resnets[0], fuse)]
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            operations += [_attention(attention, fuse), Resnet(resnet, fuse)]
        return operations


def _level(blocks: list[Any], fuse: Fuse) -> list[Operation] | None:
    """An upsampling, if it begins with one, and residual blocks."""
    upsampling = blocks[0] if hasattr(blocks[0], "repeats") else None
    resnets = blocks if upsampling is None else blocks[1:]
    if not all(map(_is_resnet, resnets)) or not (upsampling is None or is_plain(upsampling.conv)):
        return None
    operations: list[Operation] = [Resnet(resnet, fuse) for resnet in resnets]
    return operations if upsampling is None else [_upsampling(upsampling), *operations]


def _upsampling(module: Any) -> Operation:
    """Convolution and shortcut give four channels for each output channel, the four cells varying slowest."""
    given, made = module.conv.in_channels, module.conv.out_channels
    order = torch.arange(made).view(4, -1).T.flatten()
    return WithShortcut(
        [Convolution(module.conv), Duplicate(made, order, 2)], Duplicate(given, order // module.repeats, 2)
    )


def _attention(module: Any, fuse: Fuse) -> Attention:
    layers = {name: _Linear(getattr(module, name)) for name in ("to_q", "to_k", "to_v")}
    return Attention(SimpleNamespace(group_norm=module.norm, heads=1, to_out=[_Linear(module.proj)], **layers), fuse)


class _Linear:
    """A convolution of 1 x 1 as the linear layer that it is."""

    def __init__(self, module: nn.Conv2d) -> None:
        self._module = module

    @property
    def weight(self) -> Tensor:
        return self._module.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        return self._module.bias


def _is_resnet(module: Any) -> bool:
    """A residual block of group norms, SiLU and convolutions, with as many channels out as in.

    (diffusers' class applies a shortcut's convolution to the block's result; no published VAE has one.)
    """
    return (
        all(type(getattr(module, name, None)) is nn.GroupNorm for name in ("norm1", "norm2"))
        and isinstance(module.nonlinearity, nn.SiLU)
        and all(map(is_plain, [module.conv1, module.conv2]))
        and module.conv_shortcut is None
    )
