"""A random window of a feature map, for images too large for the device."""

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


def best_reach(squares: Sequence[float], costs: Sequence[float], budget: float | None = None) -> list[float]:
    """The probabilities with the least mean squared gradient at a mean cost: p_l = min(1, t sqrt(c_l / k_l)), falling.

    Neighbours whose order a falling sequence forbids are pooled: they share sqrt(sum c / sum k).

    Args:
        squares: c_l above, averaged over samples.
        costs: k_l above, in any unit.
        budget: the mean cost, between the first cost and their sum, which decides t; None: the t at which the product
            of mean squared gradient and mean cost is least, p_0 being just 1.
    """
    pools: list[tuple[float, float, int]] = []
    for square, cost in zip(squares, costs, strict=True):
        pool = (max(square, 0.0), cost, 1)
        while pools and pools[-1][0] * pool[1] <= pool[0] * pools[-1][1]:
            square_before, cost_before, size = pools.pop()
            pool = (square_before + pool[0], cost_before + pool[1], size + pool[2])
        pools.append(pool)
    top = pools[0][0] / pools[0][1]
    shape = [(square / cost / top) ** 0.5 for square, cost, size in pools for _ in range(size)]
    if budget is None:
        return shape
    low, high = 1.0, 1 / min(shape)
    for _ in range(60):
        t = (low * high) ** 0.5
        cost = mean_cost([min(1.0, t * p) for p in shape], costs)
        low, high = (low, t) if cost > budget else (t, high)
    return [min(1.0, low * p) for p in shape]


def mean_cost(reach: Sequence[float], costs: Sequence[float]) -> float:
    """sum_l k_l p_l."""
    return sum(p * k for p, k in zip(reach, costs, strict=True))


def mean_square(reach: Sequence[float], squares: Sequence[float]) -> float:
    """sum_l c_l / p_l."""
    return sum(c / p for p, c in zip(reach, squares, strict=True))
