"""Decoder outliers: isolated extreme activations of the last layers that would dominate a distance."""

import math

import torch
from torch import Tensor

MAX_STRIDE = 2
"""Layers with more pixels per cell than this have no outliers to remove."""


def inlier_mask(y: Tensor, stride: float) -> Tensor:
    """1 where a target feature is no outlier, 0 where it is; (B, C, H, W) in y's dtype.

    Per sample and channel over the n values of the map, q_lo and q_hi the max(1, floor(0.02 n))-th and
    max(1, floor(0.98 n))-th smallest and m = 2 * std: inlier is q_lo - m < y < q_hi + m. The mask is then dilated
    with a window of ceil(3 / stride) and eroded with one of ceil(5 / stride), each made odd (2 -> 1, 2 -> 3): at
    stride 1 holes of up to 2 values close and larger ones grow a margin; at stride 2 all grow.

    Source: Berrada et al., ICLR 2025, section 3.2 and appendix. Differs from the paper: windows follow the stride
    in pixels, not the index of the block; maps of under 50 values are handled.

    Args:
        y: (B, C, H, W), float32 or float64.
        stride: pixels of the image per cell of y.
    """
    values = y.flatten(2)
    n = values.shape[-1]
    low = values.kthvalue(max(1, n * 2 // 100), dim=-1).values[..., None, None]
    high = values.kthvalue(max(1, n * 98 // 100), dim=-1).values[..., None, None]
    margin = 2 * values.std(-1)[..., None, None] if n > 1 else torch.ones_like(low)
    mask = ((y > low - margin) & (y < high + margin)).to(y.dtype)
    mask = _dilate(mask, _odd(math.ceil(3 / stride), down=True))
    return 1 - _dilate(1 - mask, _odd(math.ceil(5 / stride), down=False))


def _odd(width: int, down: bool) -> int:
    return width if width % 2 else width + (-1 if down else 1)


def _dilate(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.max_pool2d(mask, width, stride=1, padding=width // 2)
