"""Convolutions with fewer products (Winograd, Arithmetic Complexity of Computations, 1980; Lavin & Gray, CVPR 2016).

Exact, sums in another order. Two outputs of a line from four inputs d take four products instead of six, F(2, 3):

    y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3,  m0 = (d0 - d2) g0,          m1 = (d1 + d2) (g0 + g1 + g2)/2,
                                            m2 = (d2 - d1) (g0 - g1 + g2)/2,  m3 = (d1 - d3) g2

and with two taps three instead of four, F(2, 2): m0 = (d0 - d1) g0, m1 = d1 (g0 + g1), m2 = (d1 - d2) g1, y0 = m0 + m1,
y1 = m1 - m2. Along columns alone each product is a 1 x 3 (or 1 x 2) convolution along the rows: 2/3 (3/4) of the
products. Along both axes each of the 16 products of F(2 x 2, 3 x 3) is one of matrices over channels: 4/9 of them,
which pays where channels are many.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from lpl.perceptual.strips import layout

MATRIX_CHANNELS, MATRIX_CELLS = 256, 4096
"""Channels of input and output, and cells of a map (all samples), from which on both axes pay."""
PART_BYTES = 2**21
"""Of the transformed rows that are worked on at once."""
Convolve = Callable[[Tensor, Tensor | None], Tensor]
"""Of rows with their halo, into the place that is given or a new one."""


def along_columns(weight: Tensor, bias: Tensor | None, padding: int) -> Convolve:
    """F(2, 3) or F(2, 2) on an even number of output rows; the width is padded by so many zeros on either side."""
    taps = weight.shape[2]
    kernels = [g.unsqueeze(2).contiguous(memory_format=torch.channels_last) for g in _kernels(weight, 2)]

    def product(rows: Tensor, number: int, bias: Tensor | None = None) -> Tensor:
        return conv2d(rows, kernels[number], bias, padding=(0, padding))

    def convolve(rows: Tensor, place: Tensor | None) -> Tensor:
        n = rows.shape[2] - taps + 1
        d = [rows[:, :, i : i + n : 2] for i in range(taps + 1)]
        if taps == 3:
            middle = product(d[1] + d[2], 1, bias)
            other = product(d[2] - d[1], 2)
            first = product(d[0] - d[2], 0).add_(middle).add_(other)
            second = middle.sub_(other).sub_(product(d[1] - d[3], 3))
        else:
            middle = product(d[1], 1, bias)
            first = product(d[0] - d[1], 0).add_(middle)
            second = middle.sub_(product(d[1] - d[2], 2))
        out = place
        if out is None:
            shape = (len(first), first.shape[1], n, first.shape[3])
            out = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=layout(first))
        out[:, :, ::2], out[:, :, 1::2] = first, second
        return out

    return convolve


def pays_on_both_axes(weight: Tensor, x: Tensor, padding: int) -> bool:
    """Whether `along_both` is the faster way on the map x."""
    wide = min(weight.shape[:2]) >= MATRIX_CHANNELS and x.shape[0] * x.shape[2] * x.shape[3] >= MATRIX_CELLS
    last = x.is_contiguous(memory_format=torch.channels_last)
    return wide and last and tuple(weight.shape[2:]) == (3, 3) and padding == 1 and x.shape[3] % 2 == 0


def along_both(weight: Tensor, bias: Tensor | None) -> Convolve:
    """F(2 x 2, 3 x 3) on an even number of output rows and columns, of maps that lie channels last."""
    taps = weight.permute(2, 3, 1, 0).contiguous()
    kernels = torch.stack([g for line in _kernels(taps, 0) for g in _kernels(line, 0)])  # 16, in, out

    def convolve(rows: Tensor, place: Tensor | None) -> Tensor:
        batch, channels, height, width = rows.shape
        out = place
        if out is None:
            out = rows.new_empty((batch, height - 2, width, kernels.shape[2])).permute(0, 3, 1, 2)
        lines = max(2, PART_BYTES // (4 * width * batch * channels * rows.element_size()) // 2 * 2)
        for first in range(0, height - 2, lines):
            last = min(first + lines, height - 2)
            _some(rows[:, :, first : last + 2], kernels, bias, out[:, :, first:last])
        return out

    return convolve


def _some(rows: Tensor, kernels: Tensor, bias: Tensor | None, place: Tensor) -> None:
    """A few rows of the output."""
    x, y = rows.permute(0, 2, 3, 1), place.permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    n = height - 2
    lines = x.new_empty((4, batch, n // 2, width + 2, channels))
    lines[:, :, :, 0], lines[:, :, :, -1] = 0, 0
    _transform([x[:, i : i + n : 2] for i in range(4)], lines[:, :, :, 1:-1])
    cells = x.new_empty((4, 4, batch, n // 2, width // 2, channels))
    _transform([lines[:, :, :, i : i + width : 2] for i in range(4)], cells.transpose(0, 1))
    products = torch.bmm(cells.view(16, -1, channels), kernels)
    for a, line in enumerate(_outputs(products.view(4, 4, batch, n // 2, width // 2, -1))):
        for c, value in enumerate(_outputs(line)):
            target = y[:, a::2, c::2]
            target.copy_(value) if bias is None else torch.add(value, bias, out=target)


def _transform(d: list[Tensor], out: Tensor) -> None:
    """The factors of the four products of F(2, 3)."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _outputs(m: Tensor) -> tuple[Tensor, Tensor]:
    """The two outputs of F(2, 3)."""
    return m[1].add(m[2]).add_(m[0]), m[1].sub(m[2]).sub_(m[3])


def _kernels(weight: Tensor, axis: int) -> list[Tensor]:
    """The weights of an axis's products."""
    if weight.shape[axis] == 2:
        g0, g1 = weight.unbind(axis)
        return [g0, g0 + g1, g1]
    g0, g1, g2 = weight.unbind(axis)
    outer = g0 + g2
    return [g0, (outer + g1) / 2, (outer - g1) / 2, g2]
