"""The distance of two feature maps at a tap, and its gradient: normalised, and without the target's outliers.

Maps are (B, C, H, W), as written here, or have one or three axes of space, (B, C, L) or (B, C, D, H, W); the first of
these axes is called rows. Outliers are isolated extreme activations of the decoder's last layers, which would dominate
a distance.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpl.perceptual.convolution import Rows, rows_of
from lpl.perceptual.frozen import Fuse
from lpl.perceptual.strips import Bits, arithmetic, cells, channel_moments, space, spans

MAX_STRIDE = 2
"""Layers with more pixels per cell than this have no outliers to remove."""
SAMPLE = 2**16
"""Order statistics of a larger map are estimated from a regular grid of at least this many of its values."""
HALO = 4
"""Rows on either side of a strip that its mask depends on, rounded up to an even number."""


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
    axes, step = y.dim() - 2, 1
    while (step + 1) ** axes <= cells(y) // SAMPLE:
        step += 1
    strided: list[Any] = [..., *[slice(None, None, step)] * axes]
    grid = y[tuple(strided)]
    n = cells(grid)
    low, high = max(1, n * 2 // 100), max(1, n * 98 // 100)
    parts = []
    for block in grid.split(64, 1):  # a block's values are copied
        values = block.flatten(2).to(arithmetic(y)).contiguous()
        parts.append(torch.stack([_kth(values, low, largest=False), _kth(values, n - high + 1, largest=True)]))
    q_low, q_high = (q.view_as(std) for q in torch.cat(parts, 2).unbind())
    margin = 2 * std if cells(y) > 1 else torch.ones_like(std)
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
    each made odd (2 -> 1, 2 -> 3): at stride 1 holes of up to 2 values close and larger ones gain a margin; at stride 2
    all holes grow. Nothing spreads in from beyond the map's edge.

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
    """True where any value is True in a window of `width` cells along every axis."""
    for axis in space(mask):
        out, size = mask.clone(), mask.shape[axis]
        for shift in range(1, min(width // 2, size - 1) + 1):
            rest = size - shift
            out.narrow(axis, shift, rest).logical_or_(mask.narrow(axis, 0, rest))
            out.narrow(axis, 0, rest).logical_or_(mask.narrow(axis, shift, rest))
        mask = out
    return mask


NORM_TYPES = ("default", "shared", "batch", "channel", "channel_detached", "own")


class TargetStatistics(NamedTuple):
    """Statistics of the target's whole map at a tap, (B, C, 1, 1); those for logs (B,)."""

    inliers: dict[int, Bits] | None
    """Where the target is no outlier, by the first row of a strip; None: no outliers are removed."""
    counted: Tensor
    """Number of values that count, or the sum of their mask."""
    moments: tuple[Tensor, Tensor] | None
    """For `batch` and `own`: mean and sum of squared deviations of the masked map."""
    size: int
    """Values of a channel: H * W, or the product of all axes of space."""
    outlier_fraction: Tensor
    mean: Tensor
    std: Tensor

    def mask(self, first: int) -> Tensor | None:
        """The inliers in the strip that begins with this row."""
        return None if self.inliers is None else self.inliers[first].mask()


class FeatureDistance:
    """The distance at one tap.

    Args:
        norm_type: one of NORM_TYPES.
        loss_type: mse or l1.
        stride: pixels of the image per cell of the map.
        remove_outliers: mask the target's outliers, where the stride is at most MAX_STRIDE.
        fuse: applied to the pointwise functions: torch.compile, or the identity.
    """

    def __init__(self, norm_type: str, loss_type: str, stride: float, remove_outliers: bool, fuse: Fuse) -> None:
        self.norm_type, self.loss_type, self.stride = norm_type, loss_type, stride
        self.masks = remove_outliers and stride <= MAX_STRIDE
        self.error = fuse(_error)

    def statistics(self, y: Tensor, inside: Tensor | None) -> TargetStatistics:
        """Statistics of the whole map y (B, C, H, W); inside: (B, 1, H, W), the caller's mask.

        Raises:
            ValueError: too few values for a standard deviation that the norm needs.
        """
        batch, channels, height = y.shape[:3]
        n, axes = cells(y), space(y)
        if self.norm_type not in ("default", "shared") and n * (batch if self.norm_type == "batch" else 1) < 2:
            raise ValueError(
                f"norm {self.norm_type!r} needs at least 2 values per channel; the features are {tuple(y.shape)}"
            )
        mean, squares = channel_moments(y)
        overall = mean.mean(1, keepdim=True)
        variance = (squares + n * (mean - overall).square()).flatten(1).sum(1) / max(channels * n - 1, 1)
        kept: dict[int, Bits] | None = None
        inliers = torch.full_like(mean, n)
        count = inliers if inside is None else inside.to(mean.dtype).sum(axes, keepdim=True).expand_as(mean)
        if self.masks:
            kept, inliers, count = {}, torch.zeros_like(mean), torch.zeros_like(mean)
            ends = inlier_range(y, (squares / max(n - 1, 1)).sqrt())
            for first, last in spans(y):
                low, high = max(0, first - HALO), min(height, last + HALO)
                mask = inlier_mask(y[:, :, low:high], *ends, self.stride)[:, :, first - low : last - low]
                kept[first] = Bits.of(mask)
                inliers += mask.sum(axes, keepdim=True)
                count += (mask if inside is None else mask * inside[:, :, first:last]).sum(axes, keepdim=True)
        outliers = 1 - inliers.flatten(1).sum(1) / (channels * n)
        found = TargetStatistics(kept, count, None, n, outliers, overall.flatten(), variance.sqrt())
        if self.norm_type in ("batch", "own"):
            found = found._replace(
                moments=channel_moments(y, lambda *rows: _masked(rows_of(y), found.mask(rows[0]), *rows))
            )
        return found

    def __call__(
        self,
        x: Tensor,
        y: Rows,
        statistics: TargetStatistics,
        inside: Tensor | None,
        batch_scale: Tensor | None,
        weight: float,
        grad: Tensor | None,
    ) -> Tensor:
        """The distances d (B,).

        Args:
            x: (B, C, H, W), the whole map.
            y: rows of the target's, from an even row to an even row (or the last).
            statistics: of the target.
            inside: (B, 1, H, W), the caller's mask.
            batch_scale: for `batch`, from batch_scale().
            weight: of this distance in the gradient.
            grad: like x; weight * dd/dx is added to it. None: no gradient is computed.
        """
        if self.norm_type == "own":
            return self._own(x, y, statistics, inside, weight, grad)
        dtype = arithmetic(x)
        scale, through = batch_scale, None
        if self.norm_type.startswith("channel"):
            mean, squares = channel_moments(x)
            n = cells(x)
            std = (squares / (n - 1)).sqrt()
            scale = 1 / (std + 1e-6)
            # Of the scale s = 1/(std + 1e-6): ds/dx = -s^2 (x - mean) / ((n - 1) std); and dd/ds = p d / s.
            power = 2 if self.loss_type == "mse" else 1
            through = torch.where(std > 0, -power * scale / ((n - 1) * std), 0) if self.norm_type == "channel" else None
        share = torch.where(statistics.counted > 0, 1 / statistics.counted, 0) / x.shape[1]
        distance = torch.zeros_like(share)
        for first, last in spans(x):
            mask = statistics.mask(first)
            target = _masked(y, mask, first, last)
            counts = share if mask is None else share * mask
            if inside is not None:
                counts = counts * inside[:, :, first:last]
            source = x[:, :, first:last].to(dtype)
            d, g = self.error(source, target, counts, scale, self.norm_type, self.loss_type, grad is not None)
            distance += d
            if grad is not None:
                grad[:, :, first:last].add_(g, alpha=weight)
        if grad is not None and through is not None:
            slope = weight * distance * through
            for first, last in spans(x):
                grad[:, :, first:last].add_(slope * (x[:, :, first:last] - mean))
        return distance.flatten(1).sum(1) + _seen(statistics)

    def _own(
        self,
        x: Tensor,
        y: Rows,
        statistics: TargetStatistics,
        inside: Tensor | None,
        weight: float,
        grad: Tensor | None,
    ) -> Tensor:
        """`own`: with z = mask * x, s = 1/(std + 1e-6), v = (z - mean) s and g = dd/dv,

        dd/dz = s (g - sum(g)/n) - s sum(g v) (z - mean) / ((n - 1) std).
        """
        n = statistics.size
        assert statistics.moments is not None
        target_mean, squares = statistics.moments
        target_scale = 1 / ((squares / (n - 1)).sqrt() + 1e-6)
        mean, squares = channel_moments(x, lambda first, last: _masked(rows_of(x), statistics.mask(first), first, last))
        std = (squares / (n - 1)).sqrt()
        scale = 1 / (std + 1e-6)
        share = torch.where(statistics.counted > 0, 1 / statistics.counted, 0) / x.shape[1]
        distance, total, along = (torch.zeros_like(share) for _ in range(3))
        for first, last in spans(x):
            mask = statistics.mask(first)
            target = _masked(y, mask, first, last)
            v = (_masked(rows_of(x), mask, first, last) - mean) * scale
            counts = share if mask is None else share * mask
            if inside is not None:
                counts = counts * inside[:, :, first:last]
            one = torch.ones_like(scale)
            d, g = self.error(
                v, (target - target_mean) * target_scale, counts, one, self.norm_type, self.loss_type, grad is not None
            )
            distance += d
            if grad is not None and g is not None:
                total += g.sum(space(g), keepdim=True)
                along += (g * v).sum(space(g), keepdim=True)
                grad[:, :, first:last].add_(g * scale, alpha=weight)
        if grad is not None:
            slope = torch.where(std > 0, weight * scale * along / ((n - 1) * std), 0)
            level = weight * scale * total / n
            for first, last in spans(x):
                mask = statistics.mask(first)
                through = level + slope * (_masked(rows_of(x), mask, first, last) - mean)
                grad[:, :, first:last].sub_(through if mask is None else through * mask)
        return distance.flatten(1).sum(1) + _seen(statistics)


def _masked(y: Rows, mask: Tensor | None, first: int, last: int) -> Tensor:
    """Rows of a map in their arithmetic precision, 0 where they are masked."""
    rows = y(first, last)
    rows = rows.to(arithmetic(rows))
    return rows if mask is None else rows * mask


def _seen(statistics: TargetStatistics) -> Tensor:
    """NaN where the target is not finite, else 0, (B,): a value under the mask must show, too."""
    return torch.where(statistics.std.isfinite() & statistics.mean.isfinite(), 0.0, torch.nan)


def batch_scale(targets: list[TargetStatistics]) -> Tensor:
    """1 / (std + 1e-6) per channel, over space and all samples of all targets, (1, C, 1, 1)."""
    n = targets[0].size
    means = torch.cat([t.moments[0] for t in targets if t.moments is not None])
    squares = torch.cat([t.moments[1] for t in targets if t.moments is not None])
    between = n * (means - means.mean(0, keepdim=True)).square()
    return 1 / (((squares + between).sum(0, keepdim=True) / (n * len(means) - 1)).sqrt() + 1e-6)


def _error(
    x: Tensor, y: Tensor, counts: Tensor, scale: Tensor | None, norm_type: str, loss_type: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """sum(counts * |u|^p) over space, (B, C, 1, 1), and its derivative with respect to x (the scale held fixed)."""
    if norm_type == "default":
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        scale = 1 / (length + 1e-10)
        u = x * scale - y * (1 / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-10))
    else:
        if norm_type == "shared":
            scale = 1 / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-6)
        assert scale is not None
        u = (x - y).mul_(scale)
    weighted = counts * (u if loss_type == "mse" else u.sign())
    distance = (weighted * u).sum(space(u), keepdim=True)
    if not with_gradient:
        return distance, None
    gradient = weighted.mul_(2 * scale if loss_type == "mse" else scale)
    if norm_type == "default":
        along = (gradient * x).sum(1, keepdim=True)
        gradient = gradient - x * torch.where(length > 0, along * scale / length, 0)
    return distance, gradient
