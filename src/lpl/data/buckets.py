"""Crop sizes of one area and many aspects, and which of them an image goes to."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

from lpl.base.errors import UserError
from lpl.config import DataConfig


class Buckets:
    """Crop sizes, (height, width) in pixels, from tall to wide, no two of the same aspect."""

    sizes: list[tuple[int, int]]

    def __init__(self, area: int, step: int, max_aspect: float) -> None:
        """All sizes that cannot grow on either side without exceeding the area or the aspect; and the largest square.

        Args:
            area: most pixels of a size.
            step: both sides are multiples of it.
            max_aspect: the largest ratio of the long side to the short one, at least 1.

        Raises:
            UserError: not even one square of the step's side fits into the area.
        """
        if step * step > area:
            raise UserError(
                f"--bucket_step {step}: no size of that step fits into {area} pixels "
                "(--bucket_area, or --resolution squared): lower --bucket_step, or raise --bucket_area or --resolution"
            )
        square = math.isqrt(area) // step
        most = area // (step * step)
        sizes = {(square, square)}
        widest = 0
        for tall in range(min(most, math.isqrt(_floor(most * max_aspect))), 0, -1):
            wide = min(most // tall, _floor(tall * max_aspect))
            if wide > widest and tall <= _floor(wide * max_aspect):
                widest = wide
                sizes.add((tall, wide))
        self._keep([(tall * step, wide * step) for tall, wide in sizes])

    @classmethod
    def single(cls, height: int, width: int) -> Buckets:
        """One size for every image."""
        buckets = cls.__new__(cls)
        buckets._keep([(height, width)])
        return buckets

    def nearest(self, width: int, height: int) -> int:
        """Index of the size whose aspect is nearest in log to an image's; of two equally near, the taller."""
        return bisect_left(self._limits, float(width) * float(width) / (float(height) * float(height)))

    def assign(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """`nearest` for many images, sides (N,) of 1 to 94 million pixels: (N,), int64, indices into `sizes`."""
        squared = np.asarray(widths, np.float64) ** 2 / np.asarray(heights, np.float64) ** 2
        return np.searchsorted(self._bounds, squared, side="left")

    def _keep(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sorted(sizes, key=lambda size: size[1] / size[0])
        # Midway in log, squared: quotients of whole numbers, which all machines round alike, unlike logs.
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        self._limits = [(w * wider) / (h * lower) for (h, w), (lower, wider) in pairs]
        self._bounds = np.array(self._limits, np.float64)


def _floor(sides: float) -> int:
    """Whole part; 1.1 times 10 is 11, whatever floating point makes of it."""
    return math.floor(sides * (1 + 1e-12))


def image_sizes(config: DataConfig) -> Buckets:
    """The sizes that images are cropped to: under --buckets those, else one square. Raises UserError if none fits."""
    if not config.buckets:
        return Buckets.single(config.crop_size, config.crop_size)
    return Buckets(config.bucket_area or config.crop_size**2, config.bucket_step, config.bucket_max_aspect)
