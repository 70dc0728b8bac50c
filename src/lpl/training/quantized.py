"""`--quantize_base`: frozen weights in 8 or 4 bits under a LoRA.

W x is computed with W written out in the precision of the arithmetic, one layer at a time, in the forward pass and
again in the backward pass: between them only the codes are there. (torchao's 8-bit weights leave the written-out W
to autograd, which keeps it for the backward pass: all weights that are not recomputed, in 16 bits.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpl.families.joint import JointModel

Kind = Literal["int8", "fp8", "nf4"]
BLOCK = 64
"""Neighbouring values of nf4 that share a scale."""
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, 0 among them (Dettmers et al., 2023, appendix E)."""


class Codes(NamedTuple):
    """A matrix in codes."""

    codes: Tensor
    """uint8; int8 and fp8: a byte a value, (out, in); nf4: two values a byte, the first in the upper half."""
    scale: Tensor
    """float32; int8 and fp8: of each output, (out, 1); nf4: of each block of the rows laid end to end."""
    values: Tensor | None = None
    """nf4: the two values of every byte, (256, 2) float32, kept on the device, so that no step copies them."""


def encode(weight: Tensor, kind: Kind) -> Codes:
    """The codes of a matrix.

    int8: round(127 W / m), m the largest magnitude of an output's weights. fp8: 448 W / m in float8_e4m3fn. nf4: the
    nearest value of NF4 to W / m, m the largest magnitude of a block of 64.
    """
    weight = weight.detach().float()
    if kind == "nf4":
        flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scale = flat.abs().amax(1, keepdim=True)
        table = torch.tensor(NF4, device=weight.device)
        number = torch.bucketize(flat / _nonzero(scale), (table[1:] + table[:-1]) / 2).view(-1, 2)
        values = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
        return Codes((16 * number[:, 0] + number[:, 1]).to(torch.uint8), scale, values)
    scale = weight.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)
    scaled = weight / _nonzero(scale)
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return Codes(codes.view(torch.uint8), scale)


def decode(stored: Codes, kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that the codes stand for, rounded once to a precision."""
    codes, scale, pairs = stored
    if pairs is not None:
        values = F.embedding(codes.int(), pairs).view(-1, BLOCK).mul_(scale)
        return values.to(dtype).flatten()[: shape[0] * shape[1]].view(shape)
    values = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).to(dtype)  # exact in 16 bits
    return torch.mul(values, scale, out=torch.empty_like(values))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weights are codes; its bias stays as it is.

    Attributes:
        weight, scale, values: see Codes.
    """

    scale: nn.Parameter
    values: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kind: Kind, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        home = linear.weight.device
        codes = encode(linear.weight.to(device), kind)
        # Parameters, not buffers, which several processes would exchange at every step.
        for name, tensor in zip(("weight", "scale", "values"), codes, strict=True):
            own = None if tensor is None else nn.Parameter(tensor.to(home), requires_grad=False)
            self.register_parameter(name, own)
        self.bias = linear.bias

    @property
    def stored(self) -> Codes:
        """The weights as they are kept."""
        return Codes(self.weight, self.scale, self.values)

    def dense(self, dtype: torch.dtype, stored: Codes | None = None) -> Tensor:
        """The weights, or those `stored`, written out as a matrix."""
        return decode(stored or self.stored, self.kind, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the name in nn.Linear
        """W x + b, in autocast's precision where it is active."""
        kind = input.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else input.dtype
        output: Tensor = _FrozenProduct.apply(input.to(dtype), self)
        return output if self.bias is None else output + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"{super().extra_repr()}, {self.kind}"


class _FrozenProduct(torch.autograd.Function):
    """W x with gradient W^T g; W is written out for each and never kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantizedLinear) -> Tensor:  # noqa: A002
        ctx.layer, ctx.stored = layer, layer.stored  # of an offloaded layer, the present copy
        return input @ layer.dense(input.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        [gradient] = gradients
        return (gradient @ ctx.layer.dense(gradient.dtype, ctx.stored) if ctx.needs_input_grad[0] else None), None


def quantize(
    denoiser: nn.Module, kind: Kind, device: torch.device, progress: Callable[[list[Any]], Any] = iter
) -> None:
    """Replaces the weights of every linear layer in the repeated blocks by codes; embeddings, output, convolutions and
    text encoders stay.

    Args:
        denoiser: frozen; changed in place.
        device: where codes are made, a layer at a time; they are kept where the weights were.
        progress: goes over the layers, as a bar does.
    """
    body = denoiser.parts[0] if isinstance(denoiser, JointModel) else denoiser
    blocks = {id(m): m for several in body.modules() if isinstance(several, nn.ModuleList) for m in several.modules()}
    found = [(m, name) for m in blocks.values() for name, child in m.named_children() if isinstance(child, nn.Linear)]
    values = None
    for parent, name in progress(found):
        layer = QuantizedLinear(getattr(parent, name), kind, device)
        values = layer.values = layer.values if values is None else values  # one for all of them
        setattr(parent, name, layer)
