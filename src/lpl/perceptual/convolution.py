"""Convolutions whose weights are frozen: exact, strip by strip, keeping nothing for the backward pass.

Two identities save arithmetic; both are exact, sums in another order.

- The 3 x 3 convolution behind a nearest-neighbour upsampling reads each input value up to four times; adding the
  weights that meet the same value first gives four 2 x 2 convolutions of the small map, 16/36 of the products.
- Winograd's way (winograd.py), on a CPU in float32, where its rounding error is no larger than the direct sum's. In
  bfloat16 it would double the error; GPU libraries choose their own way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from lpl.perceptual.strips import Make, arithmetic, assemble, layout, spans, window
from lpl.perceptual.winograd import along_both, along_columns, pays_on_both_axes

Rows = Callable[[int, int], Tensor]
"""Rows first to last of a map."""
MATRIX_CELLS = 256
"""Cells of a map (all samples) up to which a folded convolution is a product of matrices."""
SMALL_CELLS = 4096
"""Cells of a map (all samples) below which transposing a convolution's weights costs more than it saves."""
WINOGRAD_CHANNELS, WINOGRAD_CELLS = 64, 1024
"""Input channels and cells of a map (all samples) from which on Winograd's way pays for making its weights."""


class Operation(ABC):
    """A part of the decoder, from map (B, C, H, W) to map; `Plain` alone takes any state.

    Runs without autograd; `differentiable` shows one to it.
    """

    @abstractmethod
    def forward(self, x: Any, keep: bool) -> tuple[Any, list[Any]]:
        """The output for x and, if keep, what backward needs."""

    @abstractmethod
    def backward(self, saved: list[Any], grad: Any) -> Any:
        """The gradient with respect to x, from the output's. Empties saved, so that maps are freed on the way."""


class Head(Operation):
    """An operation that makes a tap's map, also row by row."""

    @abstractmethod
    def rows(self, x: Tensor) -> Rows:
        """The rows of the output, from an even row to an even row."""


def rows_of(x: Tensor) -> Rows:
    """The rows of a map that exists."""
    return lambda first, last: x[:, :, first:last]


def row_convolution(
    weight: Tensor, bias: Tensor | None, x: Tensor, padding: int | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A convolution (stride 1) of strips of the map x: rows with their halo in, rows without it out.

    Columns are padded with zeros, as many as given or as keep the width; rows are not. The result may be written to a
    place that is given.
    """
    columns = (0, weight.shape[3] // 2 if padding is None else padding)

    def direct(rows: Tensor, _: Tensor | None) -> Tensor:
        return conv2d(rows, weight, bias, padding=columns)

    if not takes_winograd(weight, x):
        return direct
    both = pays_on_both_axes(weight, x, columns[1])
    winograd = along_both(weight, bias) if both else along_columns(weight, bias, columns[1])
    taps = weight.shape[2]
    return lambda rows, place: direct(rows, place) if (rows.shape[2] - taps) % 2 == 0 else winograd(rows, place)


def takes_matrix(x: Tensor) -> bool:
    """Whether a map is so small that a convolution on a CPU is mostly a matter of its weights."""
    return x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] <= MATRIX_CELLS


def is_small(x: Tensor) -> bool:
    """Whether a map is so small that a CPU had better take a convolution's weights as they are."""
    return x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] < SMALL_CELLS


def takes_winograd(weight: Tensor, x: Tensor) -> bool:
    """Whether row_convolution saves products on the map x."""
    exact = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    cells = x.shape[0] * x.shape[2] * x.shape[3]
    return exact and weight.shape[2] > 1 and weight.shape[1] >= WINOGRAD_CHANNELS and cells >= WINOGRAD_CELLS


def made_for(x: Tensor) -> torch.memory_format:
    """How weights that are made for the map x are laid out.

    A CPU takes channels last beside any map. A GPU's library would copy one of the two for every strip, and its output
    would have another layout than the map.
    """
    return torch.channels_last if x.device.type == "cpu" else layout(x)


def laid_out(weight: Tensor, x: Tensor) -> Tensor:
    """A module's weights as a convolution of the map x takes them without copying."""
    return weight if x.device.type == "cpu" else weight.contiguous(memory_format=layout(x))


def transposed(weight: Tensor, grad: Tensor) -> Tensor:
    """The weights with which a convolution's backward pass (stride 1, odd size, zero padding) is a convolution."""
    if weight.device.type != "cpu" or not weight.is_contiguous(memory_format=torch.channels_last):
        return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=made_for(grad))
    rows, columns = weight.shape[2:]
    out = weight.new_empty((weight.shape[1], rows, columns, len(weight)))
    for a in range(rows):  # tap by tap, matrices that are transposed: three times as fast as all at once
        for c in range(columns):
            out[:, rows - 1 - a, columns - 1 - c] = weight[:, :, a, c].T
    return out.permute(0, 3, 1, 2)


def matrix_convolution(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, Tensor | None], Tensor]:
    """row_convolution as one product of matrices, which does not copy the weights (channels last)."""
    size, matrix = weight.shape[2], _matrix(weight)

    def convolve(rows: Tensor, _: Tensor | None) -> Tensor:
        padded = torch.nn.functional.pad(rows, (size // 2, size // 2)).permute(0, 2, 3, 1)
        windows = padded.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)
        flat = windows.reshape(-1, matrix.shape[1])
        y = flat @ matrix.T if bias is None else torch.addmm(bias, flat, matrix.T)
        return y.view(*windows.shape[:3], -1).permute(0, 3, 1, 2)

    return convolve


def _matrix(weight: Tensor) -> Tensor:
    """(out, k * k * in)."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def gradient_to_input(weight: Tensor, grad: Tensor, padding: int | None = None) -> Tensor:
    """The backward pass of a convolution (stride 1, zero padding; half the size where it is not given) from the weights
    as they are, for maps so small that transposing them would cost more: with weights that lie channels last, of the
    smallest as a product of matrices, else torch's own.
    """
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if padding is None and channels_last and takes_matrix(grad):
        size, (batch, _, height, width) = weight.shape[2], grad.shape
        parts = (grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]) @ _matrix(weight)).view(
            batch, height, width, size, size, -1
        )
        out = parts.new_zeros((batch, height + size - 1, width + size - 1, parts.shape[-1]))
        for a in range(size):
            for c in range(size):
                out[:, a : a + height, c : c + width] += parts[:, :, :, a, c]
        inner = slice(size // 2, size // 2 + height), slice(size // 2, size // 2 + width)
        return out[:, inner[0], inner[1]].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    around = [weight.shape[2] // 2 if padding is None else padding] * 2
    height, width = (side + weight.shape[2] - 1 - 2 * around[0] for side in grad.shape[2:])
    like = grad.new_empty(1).expand(len(grad), weight.shape[1], height, width)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, like, weight, None, [1, 1], around, [1, 1], False, [0, 0], 1, [True, False, False]
    )[0]
    return found.contiguous(memory_format=layout(grad))


class LastSlice:
    """A causal convolution (kernel t x k x k, zeros before the first frame) of one frame: the 2-D one of the kernel's
    last frame. The weights follow their module. On a CPU, where cutting them out takes as long as a small map's
    convolution, they are cut out once and kept, a third of the module's.
    """

    def __init__(self, module: nn.Conv3d) -> None:
        self._module = module
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size = module.kernel_size[1:]
        self._kept: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in, k, k)."""
        whole = self._module.weight
        if whole.device.type != "cpu":
            return whole[:, :, -1]
        stamp = (whole.untyped_storage()._cdata, whole._version, whole.dtype, whole.device)
        if self._kept is None or self._kept[0] != stamp:
            self._kept = stamp, whole[:, :, -1].contiguous(memory_format=torch.channels_last)
        return self._kept[1]

    @property
    def bias(self) -> Tensor | None:
        """(out,)."""
        return self._module.bias


class Convolution(Operation):
    """y = W * x + b: a convolution of stride 1 and odd size that keeps the map's size. Keeps nothing."""

    def __init__(self, module: nn.Conv2d | LastSlice) -> None:
        self.module = module

    def rows(self, x: Tensor) -> Rows:
        """The rows of the output."""
        make = self._forward_maker(x)
        return lambda first, last: make(first, last, None)

    def rows_backward(self, grad: Tensor) -> Rows:
        """The rows of the gradient with respect to the input."""
        if self._is_mostly_weights(grad):
            return rows_of(gradient_to_input(self.module.weight, grad))
        make = self._backward_maker(grad)
        return lambda first, last: make(first, last, None)

    def convolver(self, x: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Of rows with their halo, to rows of the output, for the map x."""
        if isinstance(self.module, LastSlice) and takes_matrix(x):
            return matrix_convolution(self.module.weight, self.module.bias)
        return row_convolution(laid_out(self.module.weight, x), self.module.bias, x)

    def _forward_maker(self, x: Tensor) -> Make:
        convolve, halo = self.convolver(x), self.halo
        return lambda first, last, place: convolve(window(x, first - halo, last + halo), place)

    def _backward_maker(self, grad: Tensor) -> Make:
        convolve, halo = row_convolution(transposed(self.module.weight, grad), None, grad), self.halo
        return lambda first, last, place: convolve(window(grad, first - halo, last + halo), place)

    @property
    def halo(self) -> int:
        """Rows on either side that an output row needs."""
        return self.module.kernel_size[0] // 2

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        make = self._forward_maker(x)
        shape = (len(x), self.module.out_channels, *x.shape[2:])
        return assemble(spans(x, shape[1]), shape, x, make), []

    def _is_mostly_weights(self, grad: Tensor) -> bool:
        """Whether transposing the weights would cost more than working on a map of one strip."""
        return is_small(grad) and len(spans(grad, self.module.in_channels)) == 1

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        if self._is_mostly_weights(grad):
            return gradient_to_input(self.module.weight, grad)
        make = self._backward_maker(grad)
        shape = (len(grad), self.module.in_channels, *grad.shape[2:])
        return assemble(spans(grad, shape[1]), shape, grad, make)


class Upsampling(Head):
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
        width, channels = x.shape[3], self.module.out_channels
        bias = None if self.module.bias is None else self.module.bias.repeat(4)
        weight = self._folded(x)
        convolve = row_convolution(weight, bias, x, padding=1)
        # Winograd's way makes an even number of rows: one more than is needed, of an even number.
        end = 2 if takes_winograd(weight, x) else 1

        def fill(first: int, last: int, out: Tensor) -> None:
            y = convolve(window(x, first - 1, last + end), None)
            for phase, part in enumerate(y.split(channels, 1)):
                a, c = divmod(phase, 2)
                out[:, :, a::2, c::2] = part[:, :, a : a + last - first, c : c + width]

        return fill

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        folded = self._folded(grad)
        batch, channels, height, width = grad.shape
        height, width = height // 2, width // 2
        small = grad[:, :, ::2, ::2]
        whole = is_small(small) and len(spans(small, 4 * channels)) == 1
        weight = folded if whole else transposed(folded, grad)
        convolve = row_convolution(weight, None, small, padding=0)

        def make(first: int, last: int, _: Tensor | None) -> Tensor:
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
            return gradient_to_input(folded, stacked, padding=1) if whole else convolve(stacked, None)

        shape = (batch, folded.shape[1], height, width)
        return assemble(spans(small, 4 * channels), shape, grad, make)

    def _folded(self, x: Tensor) -> Tensor:
        """(4 * out, in, 2, 2): the weights of the four output phases, in the order of (a, c), for the map x.

        Three taps w of an axis become two: (w0, w1 + w2) for even output positions, (w0 + w1, w2) for odd ones.
        """
        weight = self.module.weight
        out, channels = weight.shape[:2]
        taps = weight.to(arithmetic(weight)).permute(2, 3, 0, 1).contiguous()
        rows = (taps[0], taps[1] + taps[2]), (taps[0] + taps[1], taps[2])
        phases = taps.new_empty((4, out, 2, 2, channels))
        for a in range(2):
            for i, (w0, w1, w2) in enumerate(rows[a]):
                even, odd = phases[2 * a, :, i], phases[2 * a + 1, :, i]
                even[:, 0], odd[:, 1] = w0, w2
                torch.add(w1, w2, out=even[:, 1])
                torch.add(w0, w1, out=odd[:, 0])
        folded = phases.view(4 * out, 2, 2, channels).permute(0, 3, 1, 2).to(weight.dtype)
        return folded.contiguous(memory_format=made_for(x))
