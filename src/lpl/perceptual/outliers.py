"""Decoder outliers: isolated extreme activations of the last layers that would dominate a distance."""

import math

import torch
from torch import Tensor

from lpl.perceptual.strips import arithmetic

MAX_STRIDE = 2
"""Layers with more pixels per cell than this have no outliers to remove."""
SAMPLE = 2**16
"""Order statistics of a larger map are estimated from a regular grid of at least this many of its values."""
HALO = 4
"""Rows around a strip that its mask depends on, rounded up to an even number."""


def inlier_range(y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The open interval of a target's inliers per sample and channel, two of (B, C, 1, 1).

    With q_lo and q_hi the max(1, floor(0.02 n))-th and max(1, floor(0.98 n))-th smallest of the n values of a map and
    m = 2 * std: from q_lo - m to q_hi + m. Where n is over 65,536, q_lo and q_hi are those of a regular grid of at
    least so many values (the mask then differs on under 0.1 % of the values).

    Source: Berrada et al., ICLR 2025, section 3.2 and appendix. Differs from the paper: maps of under 50 values are
    handled, large ones sampled.

    Args:
        y: (B, C, H, W).
        std: (B, C, 1, 1), float32 or float64, dividing by n - 1.
    """
    step = max(1, math.isqrt(y.shape[2] * y.shape[3] // SAMPLE))
    grid = y[:, :, ::step, ::step]
    n = grid.shape[2] * grid.shape[3]
    low, high = max(1, n * 2 // 100), max(1, n * 98 // 100)
    parts = []
    for block in grid.split(64, 1):  # a block's values are copied
        values = block.flatten(2).to(arithmetic(y)).contiguous()
        parts.append(torch.stack([_kth(values, low, largest=False), _kth(values, n - high + 1, largest=True)]))
    q_low, q_high = torch.cat(parts, 2)[..., None, None].unbind()
    margin = 2 * std if y.shape[2] * y.shape[3] > 1 else torch.ones_like(std)
    return q_low - margin, q_high + margin


def _kth(values: Tensor, k: int, largest: bool) -> Tensor:
    """The k-th largest (or smallest) of the last axis.

    The k largest lie in the k blocks of 8 with the largest maxima, so only these are looked through.
    """
    n = values.shape[-1]
    if n % 8 == 0 and n >= 32 * k:
        blocks = values.unflatten(-1, (8, -1))
        ends = blocks.amax(-2) if largest else blocks.amin(-2)
        chosen = ends.topk(k, largest=largest, sorted=False).indices.unsqueeze(-2)
        values = blocks.gather(-1, chosen.expand(*chosen.shape[:-2], 8, k)).flatten(-2)
    found = values.topk(k, largest=largest, sorted=False).values
    return found.amin(-1) if largest else found.amax(-1)


def inlier_mask(y: Tensor, low: Tensor, high: Tensor, stride: float) -> Tensor:
    """True where a target feature is no outlier, (B, C, H, W).

    The inliers low < y < high are dilated with a window of ceil(3 / stride) and eroded with one of ceil(5 / stride),
    each made odd (2 -> 1, 2 -> 3): at stride 1 holes of up to 2 values close and larger ones grow a margin; at stride 2
    all grow. Beyond the map's edge there is nothing to spread.

    Differs from the paper: windows follow the stride in pixels, not the index of the block.

    Args:
        y: (B, C, H, W), rows of a map with HALO more on either side where the map has them.
        low, high: from inlier_range.
        stride: pixels of the image per cell of y.
    """
    inliers = (y > low) & (y < high)
    inliers = _dilate(inliers, _odd(math.ceil(3 / stride), down=True))
    return ~_dilate(~inliers, _odd(math.ceil(5 / stride), down=False))


def _odd(width: int, down: bool) -> int:
    return width if width % 2 else width + (-1 if down else 1)


def _dilate(mask: Tensor, width: int) -> Tensor:
    """True where any value of a window of so many rows and columns is."""
    for axis in (2, 3):
        out, size = mask.clone(), mask.shape[axis]
        for shift in range(1, min(width // 2, size - 1) + 1):
            rest = size - shift
            out.narrow(axis, shift, rest).logical_or_(mask.narrow(axis, 0, rest))
            out.narrow(axis, 0, rest).logical_or_(mask.narrow(axis, shift, rest))
        mask = out
    return mask
