"""Shortcuts of decoders that repeat channels and lay them out as cells, as frozen operations."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lpl.perceptual.convolution import Operation


class Duplicate(Operation):
    """y = pixel_shuffle(x[:, source], factor): channels, some of them more than once, laid out as cells. Keeps nothing.

    Args:
        channels: channels of x.
        source: the channel of x at index (channel of y) * factor^2 + (number of the cell).
        factor: each cell of x becomes factor x factor cells; 1: channels stay channels.
    """

    def __init__(self, channels: int, source: Tensor, factor: int = 1) -> None:
        self.channels, self.source, self.factor = channels, source, factor

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        return pixel_shuffle(x[:, self.source.to(x.device, non_blocking=True)], self.factor), []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        cells = pixel_unshuffle(grad, self.factor)
        out = cells.new_zeros((len(grad), self.channels, *cells.shape[2:]))
        return out.index_add_(1, self.source.to(grad.device, non_blocking=True), cells)


class WithShortcut(Operation):
    """y = operations(x) + shortcut(x), with a shortcut that keeps nothing."""

    def __init__(self, operations: Sequence[Operation], shortcut: Operation) -> None:
        self.operations, self.shortcut = operations, shortcut

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        y, saved = x, []
        for operation in self.operations:
            y, kept = operation.forward(y, keep)
            saved.append(kept)
        return y.add_(self.shortcut.forward(x, keep=False)[0]), saved if keep else []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        around = self.shortcut.backward([], grad)
        for operation in reversed(self.operations):
            grad = operation.backward(saved.pop(), grad)
        return around.add_(grad)
