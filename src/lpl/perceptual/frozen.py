"""Exact, memory-lean operations of a decoder whose weights are frozen.

Each has a forward pass and a backward pass to its input, and keeps for the latter only what the mathematics needs: a
convolution keeps nothing, a fused GroupNorm + SiLU its input and two statistics per group, an RMS norm + SiLU its
input. (Plain autograd keeps the input of every convolution, norm and SiLU.) The result of norm + SiLU exists only strip
by strip, on its way into the convolution behind it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from lpl.perceptual.convolution import Convolution, Head, LastSlice, Operation, Rows, rows_of
from lpl.perceptual.feature_maps import State, map_of, version_of
from lpl.perceptual.strips import arithmetic, assemble, channel_moments, layout, spans, strip_bytes, window

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Applied to pointwise functions before use: the identity, or torch.compile."""


def _unfused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _norm_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return silu(torch.addcmul(shift, x, scale)).to(x.dtype)


def _norm_silu_backward(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """dL/d(norm); grad, which nothing else uses, may be overwritten."""
    grad = grad.to(scale.dtype)
    return torch.ops.aten.silu_backward.grad_input(grad, torch.addcmul(shift, x, scale), grad_input=grad)


def _norm_backward(grad: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(offset, x, slope).addcmul_(grad, scale)


class _Norm:
    """GroupNorm: (x - mean) / sqrt(var + eps) * gamma + beta, mean and var (dividing by n) over a group's channels and
    space. Backward, with h = gamma * dL/dy, xhat the standardised x, and all means over the group:
    dL/dx = (h - mean(h) - xhat * mean(h * xhat)) / std.
    """

    def __init__(self, module: nn.GroupNorm, fuse: Fuse) -> None:
        self.module, self.combine = module, fuse(_norm_backward)
        self.norm_silu, self.norm_silu_backward = fuse(_norm_silu), fuse(_norm_silu_backward)

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

        def make(first: int, last: int, _: Tensor | None) -> Tensor:
            rows = d_norm(first, last)
            sums.add_(rows.sum((2, 3), keepdim=True))
            products.add_((x[:, :, first:last] - mean).mul_(rows).sum((2, 3), keepdim=True))
            return rows.to(x.dtype)

        strips = spans(x)
        out = assemble(strips, x.shape, x, make)
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

    def silu(self, statistics: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """From rows of x to those of SiLU(norm(x))."""
        scale, shift = self.affine(*statistics)
        return lambda rows: self.norm_silu(rows, scale, shift)

    def silu_backward(self, x: Tensor, statistics: tuple[Tensor, ...], grad: Rows, plus: Rows | None) -> Tensor:
        """dL/dx, plus the rows of another gradient, from the rows of dL/dSiLU(norm(x))."""
        scale, shift = self.affine(*statistics)

        def d_norm(first: int, last: int) -> Tensor:
            return self.norm_silu_backward(grad(first, last), x[:, :, first:last], scale, shift)

        mean, rstd = statistics
        return self.backward(x, mean, rstd, d_norm, plus)


def _rms_silu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    wide = x.to(gamma.dtype)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(1e-12)
    return silu(torch.addcmul(beta, wide * (x.shape[1] ** 0.5 / length), gamma)).to(x.dtype)


def _rms_silu_backward(grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """dL/dx; grad may be overwritten."""
    grad, x = grad.to(gamma.dtype), x.to(gamma.dtype)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
    scale = x.shape[1] ** 0.5 / length
    normal = torch.addcmul(beta, x * scale, gamma)
    slope = torch.ops.aten.silu_backward.grad_input(grad, normal, grad_input=grad).mul_(gamma)
    along = (slope * x).sum(1, keepdim=True) / length.square_()
    return slope.addcmul_(x, along, value=-1).mul_(scale)


class _RMSNorm:
    """RMS norm over channels: x / |x| * sqrt(C) * gamma + beta, |x| at each location. With h = gamma * dL/dy,
    dL/dx = sqrt(C) / |x| * (h - x * sum(h * x) / |x|^2): each location by itself, so that nothing but x is kept.
    """

    def __init__(self, module: Any, fuse: Fuse) -> None:
        self.module = module
        self.rms_silu, self.rms_silu_backward = fuse(_rms_silu), fuse(_rms_silu_backward)

    def statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """None are needed."""
        return ()

    def silu(self, statistics: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """From rows of x to those of SiLU(norm(x))."""
        gamma, beta = self._affine()
        return lambda rows: self.rms_silu(rows, gamma, beta)

    def silu_backward(self, x: Tensor, statistics: tuple[Tensor, ...], grad: Rows, plus: Rows | None) -> Tensor:
        """dL/dx, plus the rows of another gradient, from the rows of dL/dSiLU(norm(x))."""
        gamma, beta = self._affine()

        def make(first: int, last: int, _: Tensor | None) -> Tensor:
            rows = self.rms_silu_backward(grad(first, last), x[:, :, first:last], gamma, beta)
            return (rows if plus is None else rows.add_(plus(first, last))).to(x.dtype)

        return assemble(spans(x), x.shape, x, make)

    def _affine(self) -> tuple[Tensor, Tensor]:
        gamma = self.module.gamma.view(1, -1, 1, 1)
        gamma = gamma.to(arithmetic(gamma))
        bias = self.module.bias
        return gamma, bias.to(gamma.dtype).view(gamma.shape) if isinstance(bias, Tensor) else torch.zeros_like(gamma)


class NormSiLUConvolution(Operation):
    """y = W * SiLU(norm(x)) + b, and the sum with another map. Keeps x and the norm's statistics.

    Args:
        norm: a GroupNorm, or an RMS norm over channels with `gamma` and `bias`.
        convolution: stride 1, odd size, which keeps the map's size.
        fuse: applied to pointwise functions.
    """

    def __init__(self, norm: Any, convolution: nn.Conv2d | LastSlice, fuse: Fuse) -> None:
        self.norm = _Norm(norm, fuse) if isinstance(norm, nn.GroupNorm) else _RMSNorm(norm, fuse)
        self.convolution = Convolution(convolution)

    def forward(self, x: Tensor, keep: bool, plus: Rows | None = None) -> tuple[Tensor, list[Any]]:
        """plus: rows of the map that is added to the output."""
        statistics = self.norm.statistics(x)
        activate = self.norm.silu(statistics)
        module, halo = self.convolution.module, self.convolution.halo
        convolve = self.convolution.convolver(x)

        def make(first: int, last: int, place: Tensor | None) -> Tensor:
            y = convolve(window(x, first - halo, last + halo, activate), place)
            return y if plus is None else y.add_(plus(first, last))

        shape = (len(x), module.out_channels, *x.shape[2:])
        y = assemble(spans(x, shape[1]), shape, x, make)
        return y, [x, *statistics] if keep else []

    def backward(self, saved: list[Any], grad: Tensor, plus: Rows | None = None) -> Tensor:
        """plus: rows of the gradient that is added to the input's."""
        x, *statistics = saved
        saved.clear()
        return self.norm.silu_backward(x, tuple(statistics), self.convolution.rows_backward(grad), plus)


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
        half = len(saved) // 2
        first, second = saved[:half], saved[half:]
        saved.clear()
        hidden = self.second.backward(second, grad)
        return self.first.backward(
            first, hidden, rows_of(grad) if self.shortcut is None else self.shortcut.rows_backward(grad)
        )


class Attention(Operation):
    """y = x + W_o attention(q, k, v) + b_o, with q, k and v linear in GroupNorm(x). Keeps x and its statistics.

    Queries are taken in strips, so that only one strip of the attention matrix exists at a time, whichever kernel
    scaled_dot_product_attention picks.
    """

    def __init__(self, module: Any, fuse: Fuse = _unfused) -> None:
        self.module, self.norm = module, _Norm(module.group_norm, fuse)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        mean, rstd = self.norm.statistics(x)
        q, k, v = self._project(x, mean, rstd)
        out = torch.cat([scaled_dot_product_attention(part, k, v) for part in q.split(self._queries(k), 2)], 2)
        y = linear(out.transpose(1, 2).flatten(2), self.module.to_out[0].weight, self.module.to_out[0].bias)
        return x + y.transpose(1, 2).view_as(x), [x, mean, rstd] if keep else []  # in the layout of x

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
        d_norm = d_norm.transpose(1, 2).view_as(x).to(mean.dtype).contiguous(memory_format=layout(x))
        return self.norm.backward(x, mean, rstd, rows_of(d_norm), rows_of(grad))

    def _project(self, x: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
        """Queries, keys and values, (B, heads, H * W, C / heads)."""
        scale, shift = self.norm.affine(mean, rstd)
        tokens = _tokens(torch.addcmul(shift, x, scale).to(x.dtype))
        layers = (self.module.to_q, self.module.to_k, self.module.to_v)
        return [_heads(linear(tokens, layer.weight, layer.bias), self.module.heads) for layer in layers]

    def _queries(self, k: Tensor) -> int:
        """Queries in a strip; more on a GPU, whose kernels write no scores out and idle with few queries."""
        scores = (32 if k.device.type == "cuda" else 4) * strip_bytes(k)
        return max(1, scores // (k.element_size() * k.shape[0] * k.shape[1] * k.shape[2]))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


class Identity(Head):
    """y = x."""

    def rows(self, x: Tensor) -> Rows:
        """The rows of the output."""
        return rows_of(x)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        return x, []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        return grad


class Plain(Operation):
    """Any function from state to state, through autograd; keeps what autograd keeps. Activations that work in place get
    a copy.

    Raises:
        ValueError: in use, where the function's output has no graph, or it changes its input in place.
    """

    def __init__(self, function: Callable[..., State], name: str = "a stage") -> None:
        self.name = name
        in_place = getattr(function, "inplace", False)
        self.function: Callable[..., State] = (lambda x: function(x.clone())) if in_place else function

    def forward(self, x: State, keep: bool) -> tuple[State, list[Any]]:
        if not keep:
            version = version_of(map_of(x))
            y = self.function(x)
            if version_of(map_of(x)) != version:
                raise ValueError(f"{self.name} changes in place what it is given: let it work on a copy")
            return y, []
        every = [part.detach() for part in _parts(x)]
        inputs = [part.requires_grad_() for part in every if part.is_floating_point()]
        with torch.enable_grad():
            # A leaf given to a module breaks torch's module trackers (FlopCounterMode).
            seen = tuple(part.view_as(part) for part in every)
            y = self.function(seen[0] if isinstance(x, Tensor) else seen)
        outputs = _parts(y)
        if not outputs[0].requires_grad:
            raise ValueError(
                f"{self.name} gives features without a graph: LPL would train nothing; run it without detach(), "
                "torch.no_grad() and torch.inference_mode()"
            )
        detached = tuple(part.detach() for part in outputs)
        return (detached[0] if isinstance(y, Tensor) else detached), [x, inputs, outputs]

    def backward(self, saved: list[Any], grad: State) -> State:
        x, inputs, outputs = saved
        saved.clear()
        pairs = [(y, g) for y, g in zip(outputs, _parts(grad), strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
        if isinstance(x, Tensor):
            return _own(found[0])
        gradients = iter(found)
        every = [next(gradients) if part.is_floating_point() else torch.zeros_like(part) for part in x]
        return every[0].clone(), *every[1:]


def _parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def _own(gradient: Tensor) -> Tensor:
    """The gradient as a tensor that can be added to in place: an expanded one is copied."""
    return gradient.clone() if 0 in gradient.stride() else gradient


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
    """An operation with frozen weights, for autograd; x must have the weights' dtype, also under autocast."""
    return lambda x: _Differentiable.apply(x, operation)
