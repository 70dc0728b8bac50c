"""The distance of two feature maps at one tap, and its gradient, by hand and strip by strip.

    d_i = mean over channels of  sum(count * |u|^p) / sum(count),    u = (norm(x) - norm(y)),  p = 2 (mse) or 1 (l1)

x: the prediction's features, y: the target's, count: 1 or 0 where outliers are masked, times the caller's mask.

    default            x / (|x| + 1e-10) - y / (|y| + 1e-10), lengths over channels at each location
    shared             (x - y) / (|y| + 1e-6)
    batch              (x - y) / (std + 1e-6), the target's standard deviation per channel over batch and space
    channel            the same with the prediction's per sample and channel, gradient through it
    channel_detached   the same, detached
    own                (x - mean) / (std + 1e-6) - (y - mean) / (std + 1e-6), each side by its own mean and
                       deviation per sample and channel, gradient through the prediction's: structure without contrast

But for `own`, means cancel: both are standardised with one mean. Standard deviations divide by n - 1; masked values are
zeros where lengths and deviations are taken: those of y, and with `own`, those of x at the same places, so that equal
maps have distance 0. Where a length or deviation is 0 its gradient is 0. A channel without anything that counts has
distance 0.

Source: Berrada et al., ICLR 2025. Differs from the paper: it standardises per channel with the prediction's statistics
(`channel`); whether the gradient passes through them is not settled by its text, so both are options. `own` is ours.
`default` and `shared` are the diffusers project's, and `batch` what it is meant to be there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lpl.perceptual.convolution import Rows, rows_of
from lpl.perceptual.frozen import Fuse
from lpl.perceptual.outliers import HALO, MAX_STRIDE, inlier_mask, inlier_range
from lpl.perceptual.strips import arithmetic, channel_moments, spans

NORM_TYPES = ("default", "shared", "batch", "channel", "channel_detached", "own")


class TargetStatistics(NamedTuple):
    """What is known of the target's map at a tap once it has been seen whole. (B, C, 1, 1) or, for logs, (B,)."""

    inlier_range: tuple[Tensor, Tensor] | None
    counted: Tensor
    """Sum of the values that count."""
    moments: tuple[Tensor, Tensor] | None
    """For `batch` and `own`: mean and sum of squared deviations of the masked map."""
    size: int
    """Values of a channel, H * W."""
    outlier_fraction: Tensor
    mean: Tensor
    std: Tensor


class FeatureDistance:
    """The distance at one tap.

    Args:
        norm_type: one of NORM_TYPES.
        loss_type: mse or l1.
        stride: pixels of the image per cell of the map.
        remove_outliers: mask the target's outliers, where the stride is at most MAX_STRIDE.
        fuse: applied to the pointwise arithmetic: torch.compile, or nothing.
    """

    def __init__(self, norm_type: str, loss_type: str, stride: float, remove_outliers: bool, fuse: Fuse) -> None:
        self.norm_type, self.loss_type, self.stride = norm_type, loss_type, stride
        self.masks = remove_outliers and stride <= MAX_STRIDE
        self.error = fuse(_error)

    def statistics(self, y: Tensor, inside: Tensor | None) -> TargetStatistics:
        """Of the whole map y (B, C, H, W); inside: (B, 1, H, W), the caller's mask.

        Raises:
            ValueError: too few values for a standard deviation that the norm needs.
        """
        batch, channels, height, width = y.shape
        n = height * width
        if self.norm_type not in ("default", "shared") and n * (batch if self.norm_type == "batch" else 1) < 2:
            raise ValueError(
                f"norm {self.norm_type!r} needs at least 2 values per channel; the features are {tuple(y.shape)}"
            )
        mean, squares = channel_moments(y)
        overall = mean.mean(1, keepdim=True)
        variance = (squares + n * (mean - overall).square()).sum((1, 2, 3)) / max(channels * n - 1, 1)
        found = inlier_range(y, (squares / max(n - 1, 1)).sqrt()) if self.masks else None
        inliers = torch.full_like(mean, n)
        count = inliers if inside is None else inside.to(mean.dtype).sum((2, 3), keepdim=True).expand_as(mean)
        if found is not None:
            inliers, count = torch.zeros_like(mean), torch.zeros_like(mean)
            for first, last in spans(y):
                mask = self._mask(rows_of(y), found, first, last, height)[0]
                inliers += mask.sum((2, 3), keepdim=True)
                count += (mask if inside is None else mask * inside[:, :, first:last]).sum((2, 3), keepdim=True)
        moments = None
        if self.norm_type in ("batch", "own"):
            moments = channel_moments(y, lambda first, last: self._masked(rows_of(y), found, first, last, height)[1])
        outliers = 1 - inliers.sum((1, 2, 3)) / (channels * n)
        return TargetStatistics(found, count, moments, n, outliers, overall.flatten(), variance.sqrt())

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
        height, dtype = x.shape[2], arithmetic(x)
        scale, through = batch_scale, None
        if self.norm_type.startswith("channel"):
            mean, squares = channel_moments(x)
            n = x.shape[2] * x.shape[3]
            std = (squares / (n - 1)).sqrt()
            scale = 1 / (std + 1e-6)
            # Of the scale s = 1/(std + 1e-6): ds/dx = -s^2 (x - mean) / ((n - 1) std); and dd/ds = p d / s.
            power = 2 if self.loss_type == "mse" else 1
            through = torch.where(std > 0, -power * scale / ((n - 1) * std), 0) if self.norm_type == "channel" else None
        share = torch.where(statistics.counted > 0, 1 / statistics.counted, 0) / x.shape[1]
        distance = torch.zeros_like(share)
        for first, last in spans(x):
            mask, target = self._masked(y, statistics.inlier_range, first, last, height)
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
        return distance.sum((1, 2, 3)) + _seen(statistics)

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
        height, dtype = x.shape[2], arithmetic(x)
        n = statistics.size

        def masked(first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
            """Rows of z and of the masked target, and the mask."""
            mask, target = self._masked(y, statistics.inlier_range, first, last, height)
            source = x[:, :, first:last].to(dtype)
            return (source if mask is None else source * mask), target, mask

        assert statistics.moments is not None
        target_mean, squares = statistics.moments
        target_scale = 1 / ((squares / (n - 1)).sqrt() + 1e-6)
        mean, squares = channel_moments(x, lambda first, last: masked(first, last)[0])
        std = (squares / (n - 1)).sqrt()
        scale = 1 / (std + 1e-6)
        share = torch.where(statistics.counted > 0, 1 / statistics.counted, 0) / x.shape[1]
        distance, total, along = (torch.zeros_like(share) for _ in range(3))
        for first, last in spans(x):
            source, target, mask = masked(first, last)
            v = (source - mean) * scale
            counts = share if mask is None else share * mask
            if inside is not None:
                counts = counts * inside[:, :, first:last]
            one = torch.ones_like(scale)
            d, g = self.error(
                v, (target - target_mean) * target_scale, counts, one, self.norm_type, self.loss_type, grad is not None
            )
            distance += d
            if grad is not None and g is not None:
                total += g.sum((2, 3), keepdim=True)
                along += (g * v).sum((2, 3), keepdim=True)
                grad[:, :, first:last].add_(g * scale, alpha=weight)
        if grad is not None:
            slope = torch.where(std > 0, weight * scale * along / ((n - 1) * std), 0)
            level = weight * scale * total / n
            for first, last in spans(x):
                source, _, mask = masked(first, last)
                through = level + slope * (source - mean)
                grad[:, :, first:last].sub_(through if mask is None else through * mask)
        return distance.sum((1, 2, 3)) + _seen(statistics)

    def _mask(self, y: Rows, found: tuple[Tensor, Tensor], first: int, last: int, height: int) -> tuple[Tensor, Tensor]:
        """The inliers in rows first to last, and these rows of y."""
        low, high = max(0, first - HALO), min(height, last + HALO)
        rows = y(low, high)
        inner = slice(first - low, last - low)
        return inlier_mask(rows, *found, self.stride)[:, :, inner], rows[:, :, inner]

    def _masked(
        self, y: Rows, found: tuple[Tensor, Tensor] | None, first: int, last: int, height: int
    ) -> tuple[Tensor | None, Tensor]:
        """The mask in rows first to last, and these rows of y, masked, in their arithmetic precision."""
        if found is None:
            rows = y(first, last)
            return None, rows.to(arithmetic(rows))
        mask, rows = self._mask(y, found, first, last, height)
        return mask, rows.to(arithmetic(rows)) * mask


def _seen(statistics: TargetStatistics) -> Tensor:
    """NaN where the target is not finite, else 0, (B,): it may lie under the mask, and is to be seen all the same."""
    return torch.where(statistics.std.isfinite() & statistics.mean.isfinite(), 0.0, torch.nan)


def batch_scale(targets: list[TargetStatistics]) -> Tensor:
    """1 / (std + 1e-6) per channel over all samples of all of these and space, (1, C, 1, 1)."""
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
    distance = (weighted * u).sum((2, 3), keepdim=True)
    if not with_gradient:
        return distance, None
    gradient = weighted.mul_(2 * scale if loss_type == "mse" else scale)
    if norm_type == "default":
        along = (gradient * x).sum(1, keepdim=True)
        gradient = gradient - x * torch.where(length > 0, along * scale / length, 0)
    return distance, gradient
