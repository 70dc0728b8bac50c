"""A random window of a feature map, for images too large for the device."""

from typing import Any

import torch
from torch import Tensor

from lpl.perceptual.convolution import Operation


class Crop(Operation):
    """A window of each sample's map.

    Args:
        side: height and width of the window in cells; a map that is smaller in one direction is kept whole there.
        windows: (B, 2) in [0, 1): place of each sample's window, from top left to bottom right, uniform over cells.
        size: height and width of the maps.
    """

    def __init__(self, side: int, windows: Tensor, size: tuple[int, int]) -> None:
        self.size = size
        self.shape = [min(side, length) for length in size]
        self.corners = [
            [int(u * (length - part + 1)) for u, length, part in zip(pair, size, self.shape, strict=True)]
            for pair in windows.tolist()
        ]

    def cut(self, x: Tensor) -> Tensor:
        """The windows of x, (B, C, height, width of the window)."""
        height, width = self.shape
        parts = [x[i : i + 1, :, top : top + height, left : left + width] for i, (top, left) in enumerate(self.corners)]
        return torch.cat(parts)

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, list[Any]]:
        return self.cut(x), []

    def backward(self, saved: list[Any], grad: Tensor) -> Tensor:
        out = grad.new_zeros((*grad.shape[:2], *self.size))
        height, width = self.shape
        for i, (top, left) in enumerate(self.corners):
            out[i, :, top : top + height, left : left + width] = grad[i]
        return out
