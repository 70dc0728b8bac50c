"""Exact, memory-lean operations of a decoder whose weights are frozen.

Each has a forward pass and the backward pass to its input, and keeps for the latter only what the mathematics needs: a
convolution nothing, a fused GroupNorm + SiLU its input and two statistics per group. (Plain autograd keeps the input of
every convolution, norm and SiLU.) The result of GroupNorm + SiLU exists only strip by strip, on its way into the
convolution behind it.

The 3 x 3 convolution behind a nearest-neighbour upsampling reads each input value up to four times; adding the weights
that meet the same value first gives four 2 x 2 convolutions of the small map, 16/36 of the arithmetic. That is exact: a
sum in another order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention, silu

from lpl.perceptual.strips import arithmetic, assemble, channel_moments, layout, spans, strip_bytes, window

Rows = Callable[[int, int], Tensor]
"""Rows first to last of a map."""
Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What is done to pointwise functions before use: nothing, or torch.compile."""


class Operation(ABC):
    """A part of the decoder. Runs without autograd; `differentiable` shows one to it."""

    @abstractmethod
    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        """The output for x (B, C, H, W) and, if keep, what backward needs."""

    @abstractmethod
    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        """The gradient with respect to x, from the output's. Empties saved, so that maps are freed on the way."""


def _unfused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _norm_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return silu(torch.addcmul(shift, x, scale)).to(x.dtype)


def _norm_silu_backward(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """dL/d(norm); grad, which is nobody else's, may be overwritten."""
    grad = grad.to(scale.dtype)
    return torch.ops.aten.silu_backward.grad_input(grad, torch.addcmul(shift, x, scale), grad_input=grad)


def _norm_backward(grad: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(offset, x, slope).addcmul_(grad, scale)


def _transposed(weight: Tensor) -> Tensor:
    """The weights with which a convolution's backward pass (stride 1, odd size, zero padding) is a convolution."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of rows that have their halo: no rows are padded, columns are."""
    return conv2d(x, weight, bias, padding=(0, weight.shape[3] // 2))


class Convolution(Operation):
    """y = W * x + b: a convolution of stride 1 and odd size that keeps the map's size. Keeps nothing."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module

    def rows(self, x: Tensor) -> Rows:
        """The rows of the output."""
        halo = self.module.weight.shape[2] // 2
        return lambda first, last: _convolve(window(x, first - halo, last + halo), self.module.weight, self.module.bias)

    def rows_backward(self, grad: Tensor) -> Rows:
        """The rows of the gradient with respect to the input."""
        weight = _transposed(self.module.weight)
        halo = weight.shape[2] // 2
        return lambda first, last: _convolve(window(grad, first - halo, last + halo), weight, None)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        return assemble(spans(x, self.module.out_channels), self.rows(x)), []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        return assemble(spans(grad, self.module.in_channels), self.rows_backward(grad))


class _Norm:
    """GroupNorm: (x - mean) / sqrt(var + eps) * gamma + beta, mean and var (dividing by n) over a group's channels and
    space. Backward, with h = gamma * dL/dy, xhat the standardised x, and all means over the group:
    dL/dx = (h - mean(h) - xhat * mean(h * xhat)) / std.
    """

    def __init__(self, module: nn.GroupNorm, fuse: Fuse) -> None:
        self.module, self.combine = module, fuse(_norm_backward)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1/std of each channel's group, (B, C, 1, 1)."""
        means, squares = channel_moments(x)
        mean = self._group_mean(means)
        variance = self._group_mean(squares / (x.shape[2] * x.shape[3]) + (means - mean).square())
        return mean, (variance + self.module.eps).rsqrt()

    def affine(self, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """The norm as x * scale + shift."""
        gamma, beta = (p.to(mean.dtype).view(1, -1, 1, 1) for p in (self.module.weight, self.module.bias))
        return gamma * rstd, beta - mean * rstd * gamma

    def backward(self, x: Tensor, mean: Tensor, rstd: Tensor, d_norm: Rows, plus: Rows | None) -> Tensor:
        """dL/dx, plus the rows of another gradient, from the rows of dL/dy, which are asked for once, in order."""
        gamma = self.module.weight.to(mean.dtype).view(1, -1, 1, 1)
        sums, products = torch.zeros_like(mean), torch.zeros_like(mean)

        def make(first: int, last: int) -> Tensor:
            rows = d_norm(first, last)
            sums.add_(rows.sum((2, 3), keepdim=True))
            products.add_((x[:, :, first:last] - mean).mul_(rows).sum((2, 3), keepdim=True))
            return rows.to(x.dtype)

        strips = spans(x)
        out = assemble(strips, make)
        # dL/dx = gamma / std * dL/dy + slope * x + offset, the same slope and offset for all channels of a group.
        n = x.shape[2] * x.shape[3]
        slope = -(rstd**3) * self._group_mean(gamma * products / n)
        offset = -rstd * self._group_mean(gamma * sums / n) - slope * mean
        for first, last in strips:
            rows = out[:, :, first:last]
            value = self.combine(rows, x[:, :, first:last], gamma * rstd, slope, offset)
            rows.copy_(value if plus is None else value.add_(plus(first, last)))
        return out

    def _group_mean(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1): each channel's value replaced by the mean of its group."""
        groups = self.module.num_groups
        mean = x.view(len(x), groups, -1).mean(2)
        return mean.repeat_interleave(x.shape[1] // groups, 1)[..., None, None]


class NormSiLUConvolution:
    """y = W * SiLU(GroupNorm(x)) + b, and the sum with another map. Keeps x and each group's mean and 1/std."""

    def __init__(self, norm: nn.GroupNorm, convolution: nn.Conv2d, fuse: Fuse) -> None:
        self.norm, self.convolution = _Norm(norm, fuse), Convolution(convolution)
        self.norm_silu, self.norm_silu_backward = fuse(_norm_silu), fuse(_norm_silu_backward)

    def forward(self, x: Tensor, keep: bool, plus: Rows | None = None) -> tuple[Tensor, list[Any]]:
        """plus: rows of the map that is added to the output."""
        mean, rstd = self.norm.statistics(x)
        scale, shift = self.norm.affine(mean, rstd)
        convolution = self.convolution.module
        halo = convolution.weight.shape[2] // 2

        def make(first: int, last: int) -> Tensor:
            norm = window(x, first - halo, last + halo, lambda rows: self.norm_silu(rows, scale, shift))
            y = _convolve(norm, convolution.weight, convolution.bias)
            return y if plus is None else y.add_(plus(first, last))

        return assemble(spans(x, convolution.out_channels), make), [x, mean, rstd] if keep else []

    def backward(self, saved: list[Any], grad: Tensor, plus: Rows | None = None) -> Tensor:
        """plus: rows of the gradient that is added to the input's."""
        x, mean, rstd = saved
        saved.clear()
        scale, shift = self.norm.affine(mean, rstd)
        grad_rows = self.convolution.rows_backward(grad)

        def d_norm(first: int, last: int) -> Tensor:
            return self.norm_silu_backward(grad_rows(first, last), x[:, :, first:last], scale, shift)

        return self.norm.backward(x, mean, rstd, d_norm, plus)


class Resnet(Operation):
    """y = shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))). Keeps x, conv1's output and their statistics."""

    def __init__(self, module: Any, fuse: Fuse = _unfused) -> None:
        self.first = NormSiLUConvolution(module.norm1, module.conv1, fuse)
        self.second = NormSiLUConvolution(module.norm2, module.conv2, fuse)
        self.shortcut = None if module.conv_shortcut is None else Convolution(module.conv_shortcut)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        hidden, first = self.first.forward(x, keep)
        y, second = self.second.forward(hidden, keep, rows_of(x) if self.shortcut is None else self.shortcut.rows(x))
        return y, first + second

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        first, second = saved[:3], saved[3:]
        saved.clear()
        hidden = self.second.backward(second, grad)
        return self.first.backward(
            first, hidden, rows_of(grad) if self.shortcut is None else self.shortcut.rows_backward(grad)
        )


class Attention(Operation):
    """y = x + W_o attention(q, k, v) + b_o, with q, k and v linear in GroupNorm(x). Keeps x and its statistics.

    Queries are taken in strips, so that no more of the attention matrix exists at a time, whatever kernel
    scaled_dot_product_attention picks.
    """

    def __init__(self, module: Any, fuse: Fuse = _unfused) -> None:
        self.module, self.norm = module, _Norm(module.group_norm, fuse)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        mean, rstd = self.norm.statistics(x)
        q, k, v = self._project(x, mean, rstd)
        out = torch.cat([scaled_dot_product_attention(part, k, v) for part in q.split(self._queries(k), 2)], 2)
        y = linear(out.transpose(1, 2).flatten(2), self.module.to_out[0].weight, self.module.to_out[0].bias)
        return y.transpose(1, 2).view_as(x) + x, [x, mean, rstd] if keep else []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        x, mean, rstd = saved
        saved.clear()
        q, k, v = self._project(x, mean, rstd)
        k, v = k.requires_grad_(), v.requires_grad_()
        d_out = _heads(_tokens(grad) @ self.module.to_out[0].weight, self.module.heads)
        d_q, d_k, d_v = [], torch.zeros_like(k), torch.zeros_like(v)
        size = self._queries(k)
        for part, d_part in zip(q.split(size, 2), d_out.split(size, 2), strict=True):
            with torch.enable_grad():
                queries = part.detach().requires_grad_()
                out = scaled_dot_product_attention(queries, k, v)
            gradients = torch.autograd.grad(out, (queries, k, v), d_part)
            d_q.append(gradients[0])
            d_k += gradients[1]
            d_v += gradients[2]
        layers = (self.module.to_q, self.module.to_k, self.module.to_v)
        d_norm = sum(
            d.transpose(1, 2).flatten(2) @ layer.weight
            for d, layer in zip((torch.cat(d_q, 2), d_k, d_v), layers, strict=True)
        )
        d_norm = d_norm.transpose(1, 2).view_as(x).to(mean.dtype)
        return self.norm.backward(x, mean, rstd, rows_of(d_norm), rows_of(grad))

    def _project(self, x: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
        """Queries, keys and values, (B, heads, H * W, C / heads)."""
        scale, shift = self.norm.affine(mean, rstd)
        tokens = _tokens(torch.addcmul(shift, x, scale).to(x.dtype))
        layers = (self.module.to_q, self.module.to_k, self.module.to_v)
        return [_heads(linear(tokens, layer.weight, layer.bias), self.module.heads) for layer in layers]

    def _queries(self, k: Tensor) -> int:
        """Queries in a strip."""
        return max(1, 4 * strip_bytes(k) // (k.element_size() * k.shape[0] * k.shape[1] * k.shape[2]))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


class Upsampling(Operation):
    """y = W * nearest(x) + b, nearest doubling height and width, W of 3 x 3. Keeps nothing.

    Output pixel (2i + a, 2j + c) is a 2 x 2 convolution of x around (i, j), with weights of its own for each (a, c):
    along an axis, taps (w0, w1 + w2) on x[i - 1], x[i] for a = 0 and (w0 + w1, w2) on x[i], x[i + 1] for a = 1. Sums
    are taken in float32 and rounded to the weights' precision: in bfloat16 the error is up to 1.5 times that of 3 x 3.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module

    def rows(self, x: Tensor) -> Rows:
        """The rows of the output, from an even row to an even row."""
        fill = self._filler(x)

        def make(first: int, last: int) -> Tensor:
            out = self._empty(x, last - first)
            fill(first // 2, last // 2, out)
            return out

        return make

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        fill, out = self._filler(x), self._empty(x, 2 * x.shape[2])
        for first, last in spans(x, 4 * self.module.out_channels):
            fill(first, last, out[:, :, 2 * first : 2 * last])
        return out, []

    def _empty(self, x: Tensor, rows: int) -> Tensor:
        shape = (len(x), self.module.out_channels, rows, 2 * x.shape[3])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))

    def _filler(self, x: Tensor) -> Callable[[int, int, Tensor], None]:
        """Fills out with the output's rows for rows first to last of x."""
        weight, width = self._folded(), x.shape[3]
        bias = None if self.module.bias is None else self.module.bias.repeat(4)

        def fill(first: int, last: int, out: Tensor) -> None:
            y = conv2d(window(x, first - 1, last + 1), weight, bias, padding=(0, 1))
            for phase, part in enumerate(y.split(self.module.out_channels, 1)):
                a, c = divmod(phase, 2)
                out[:, :, a::2, c::2] = part[:, :, a : a + last - first, c : c + width]

        return fill

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        weight = _transposed(self._folded())
        batch, channels, height, width = grad.shape
        height, width = height // 2, width // 2

        def make(first: int, last: int) -> Tensor:
            # The gradient of y in `rows`: its four phases stacked, each moved by half a pixel.
            stacked = torch.empty(
                (batch, 4 * channels, last - first + 1, width + 1),
                dtype=grad.dtype,
                device=grad.device,
                memory_format=layout(grad),
            ).zero_()
            for phase, part in enumerate(stacked.split(channels, 1)):
                a, c = divmod(phase, 2)
                rows = grad[:, :, a::2, c::2]
                low, high = max(first - a, 0), min(last + 1 - a, height)
                part[:, :, low + a - first : high + a - first, c : c + width] = rows[:, :, low:high]
            return conv2d(stacked, weight)

        small = grad[:, :, ::2, ::2]
        return assemble(spans(small, 4 * channels), make)

    def _folded(self) -> Tensor:
        """(4 * out, in, 2, 2): the weights of the four output phases, in the order of (a, c)."""
        weight = self.module.weight
        phases = [w for rows in _fold(weight.to(arithmetic(weight)), 2) for w in _fold(rows, 3)]
        return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _fold(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps on an upsampled axis as two on the original: for even output positions and for odd ones."""
    w0, w1, w2 = weight.unbind(axis)
    return torch.stack([w0, w1 + w2], axis), torch.stack([w0 + w1, w2], axis)


class Identity(Operation):
    """y = x."""

    def rows(self, x: Tensor) -> Rows:
        """The rows of the output."""
        return rows_of(x)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        return x, []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        return grad


class Plain(Operation):
    """Any function of a map, through autograd; keeps what autograd keeps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        if not keep:
            return self.function(x), []
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = self.function(x.view_as(x))  # a leaf given to a module breaks torch's module trackers (FlopCounterMode)
        return y.detach(), [x, y]

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        x, y = saved
        saved.clear()
        return torch.autograd.grad(y, x, grad)[0]


def rows_of(x: Tensor) -> Rows:
    """The rows of a map that exists."""
    return lambda first, last: x[:, :, first:last]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Operation) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, saved = operation.forward(x, keep=True)
        ctx.operation = operation
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return ctx.operation.backward(list(ctx.saved_tensors), grad), None


def differentiable(operation: Operation) -> Callable[[Tensor], Tensor]:
    """An operation of frozen weights as a function for autograd: x in the weights' dtype, also under autocast."""
    return lambda x: _Differentiable.apply(x, operation)
