"""Which blocks of diffusers have frozen operations: recognised by their structure, not by the class that holds them."""

from typing import Any

from torch import nn

from lpl.perceptual.convolution import Convolution, Head, Operation, Upsampling
from lpl.perceptual.frozen import Attention, Fuse, Identity, NormSiLUConvolution, Plain, Resnet


def frozen_stage(stage: Any, fuse: Fuse) -> tuple[list[Operation], Head | None, int]:
    """A stage's operations, the upsampling at its end, if any, and how many operations are frozen ones.

    Modules of a nn.Sequential are taken in turn; those without frozen operations run as plain blocks.
    """
    operations: list[Operation] = []
    modules = _flat(stage)
    while modules:
        taken, found = _next(modules, fuse)
        operations += found
        modules = modules[taken:]
    frozen = sum(not isinstance(operation, Plain) for operation in operations)
    last = operations[-1] if operations else None
    if not isinstance(last, Upsampling):
        return operations, None, frozen
    return operations[:-1], last, frozen


def _flat(stage: Any) -> list[Any]:
    """The modules of nested nn.Sequentials (those without hooks), in order, without nn.Identity."""
    if type(stage) is nn.Identity and not _changed(stage):
        return []
    if type(stage) is nn.Sequential and not _changed(stage):
        return [module for part in stage for module in _flat(part)]
    return [stage]


def as_built(module: Any) -> bool:
    """Whether a module and its parts compute what their classes do: no hooks, no forward set on an instance."""
    return isinstance(module, nn.Module) and not any(map(_changed, module.modules()))


def _changed(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _next(modules: list[Any], fuse: Fuse) -> tuple[int, list[Operation]]:
    """The operations of the first module or modules, after the number of modules that they cover."""
    looked_at: list[Any] = [module if as_built(module) else None for module in [*modules, None, None][:3]]
    first, second, third = looked_at
    if is_plain(first):
        return 1, [Convolution(first)]
    if is_resnet(first):
        return 1, [Resnet(first, fuse)]
    if type(first) is nn.GroupNorm and first.affine and type(second) is nn.SiLU and is_plain(third):
        return 3, [NormSiLUConvolution(first, third, fuse)]
    doubles = type(first) is nn.Upsample and first.mode == "nearest" and first.scale_factor == 2
    if doubles and is_plain(second) and second.kernel_size == (3, 3):
        return 2, [Upsampling(second)]
    block = frozen_block(first, fuse) if hasattr(first, "upsamplers") and hasattr(first, "resnets") else None
    if block is not None:
        return 1, [*block[0], *([block[1]] if isinstance(block[1], Upsampling) else [])]
    return 1, [Plain(modules[0], f"a stage's {type(modules[0]).__name__}")]


def frozen_block(block: Any, fuse: Fuse) -> tuple[list[Operation], Head] | None:
    """An up block's operations and the upsampling behind them; None if it is built otherwise."""
    upsamplers = list(block.upsamplers or [])
    known = type(block).__name__ == "UpDecoderBlock2D" and all(map(is_resnet, block.resnets))
    if not known or len(upsamplers) > 1 or not all(map(is_upsampling, upsamplers)):
        return None
    head = Upsampling(upsamplers[0].conv) if upsamplers else Identity()
    return [Resnet(resnet, fuse) for resnet in block.resnets], head


def frozen_attention(module: Any, fuse: Fuse) -> Operation:
    """A middle block's attention, as a plain block where it is built otherwise than SDXL's."""
    return Attention(module, fuse) if is_attention(module) else Plain(module)


def is_plain(module: Any) -> bool:
    """A convolution of stride 1 and odd size that keeps the map's size."""
    return (
        type(module) is nn.Conv2d
        and module.padding == tuple(k // 2 for k in module.kernel_size)
        and module.kernel_size[0] == module.kernel_size[1] in (1, 3)
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def is_resnet(module: Any) -> bool:
    """A ResnetBlock2D of group norms, SiLU and convolutions, without time."""
    return (
        type(module).__name__ == "ResnetBlock2D"
        and module.upsample is module.downsample is module.time_emb_proj is None
        and module.time_embedding_norm in ("default", "group")
        and module.output_scale_factor == 1
        and isinstance(module.nonlinearity, nn.SiLU)
        and type(module.norm1) is type(module.norm2) is nn.GroupNorm
        and all(map(is_plain, [module.conv1, module.conv2]))
        and (module.conv_shortcut is None or is_plain(module.conv_shortcut))
    )


def is_attention(module: Any) -> bool:
    """Self-attention of a group norm, with a residual connection."""
    return (
        type(module).__name__ == "Attention"
        and type(module.processor).__name__ == "AttnProcessor2_0"
        and type(module.group_norm) is nn.GroupNorm
        and module.spatial_norm is module.norm_q is module.norm_k is module.norm_cross is None
        and module.residual_connection
        and module.rescale_output_factor == 1
        and all(type(m) is nn.Linear for m in (module.to_q, module.to_k, module.to_v, module.to_out[0]))
    )


def is_upsampling(module: Any) -> bool:
    """Nearest-neighbour doubling and a convolution of 3 x 3."""
    return (
        type(module).__name__ == "Upsample2D"
        and module.use_conv and module.interpolate and module.norm is None and module.name == "conv"
        and is_plain(module.conv)
        and module.conv.kernel_size == (3, 3)
    )  # fmt: skip
