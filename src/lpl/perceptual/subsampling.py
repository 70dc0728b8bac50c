"""Estimates of the loss: of a random window of the feature maps, and of a random number of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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


REACH = (1.0, 1.0, 0.4, 0.3, 0.25)
"""For the taps of SDXL's decoder (middle block and four up blocks), from benchmarks/random_depth.py."""


def reach_probabilities(taps: int, given: bool | Sequence[float]) -> tuple[float, ...] | None:
    """The probability of reaching each tap, or None without random depth.

    Args:
        taps: how many there are.
        given: False; True for REACH (a decoder with more taps keeps its last value); or the probabilities.

    Raises:
        ValueError: probabilities that are not one per tap, do not start at 1, rise, or reach 0.
    """
    if given is False:
        return None
    if given is True:
        return tuple(REACH[min(i, len(REACH) - 1)] for i in range(taps))
    reach = tuple(float(p) for p in given)
    falls = all(a >= b > 0 for a, b in pairwise(reach))
    if len(reach) != taps or reach[0] != 1 or not falls:
        raise ValueError(f"random_depth needs {taps} probabilities, one per tap, falling from 1 and above 0: {reach}")
    return reach


def depth_of(draw: float, reach: Sequence[float]) -> int:
    """How many taps are compared, for a draw that is uniform in [0, 1)."""
    return sum(draw < p for p in reach)
