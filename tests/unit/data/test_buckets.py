"""Sizes of buckets, and the nearest one to an image."""

from fractions import Fraction

import numpy as np
import pytest

from lpl.base.errors import UserError
from lpl.data.buckets import Buckets

SETTINGS = [
    (1024 * 1024, 64, 2.0), (1024 * 1024, 64, 4.0), (512 * 512, 64, 2.0), (1_000_000, 64, 1.5), (512 * 512, 8, 2.0),
    (300_000, 32, 1.1), (64 * 64, 64, 2.0), (40 * 40, 8, 3.0), (128 * 64, 64, 2.0), (768 * 768, 64, 1.0),
    (725 * 64 * 64, 64, 1.16),
]  # fmt: skip


def test_sizes_for_sdxl() -> None:
    tall = [(1408, 704), (1344, 768), (1216, 832), (1152, 896), (1088, 960)]
    assert Buckets(1024 * 1024, 64, 2.0).sizes == [*tall, (1024, 1024), *[(w, h) for h, w in reversed(tall)]]
    assert Buckets(64 * 64, 64, 2.0).sizes == [(64, 64)]
    assert Buckets(128 * 64, 64, 2.0).sizes == [(128, 64), (64, 64), (64, 128)]


@pytest.mark.parametrize(("area", "step", "max_aspect"), SETTINGS)
def test_sizes_are_all_that_cannot_grow(area: int, step: int, max_aspect: float) -> None:
    sides = range(step, int((area * max_aspect) ** 0.5) + step, step)
    limit = Fraction(str(max_aspect))
    allowed = np.array([[h * w <= area and max(h, w) <= limit * min(h, w) for w in sides] for h in sides])
    # Of each size, how many allowed ones are at least as tall and as wide, itself included.
    as_large = allowed[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]
    best = {(sides[i], sides[j]) for i, j in np.argwhere(allowed & (as_large == 1)).tolist()}
    square = sides[int(np.flatnonzero(allowed.diagonal())[-1])]
    sizes = Buckets(area, step, max_aspect).sizes
    assert set(sizes) == best | {(square, square)}
    assert len({Fraction(w, h) for h, w in sizes}) == len(sizes)
    assert sizes == sorted(sizes, key=lambda size: size[1] / size[0])
    assert {(w, h) for h, w in sizes} == set(sizes)


@pytest.mark.parametrize(("area", "step", "max_aspect"), SETTINGS)
def test_nearest_is_the_nearest_aspect(area: int, step: int, max_aspect: float) -> None:
    buckets = Buckets(area, step, max_aspect)
    rng = np.random.default_rng(step)
    widths, heights = np.exp(rng.uniform(0, np.log(20000), (2, 300))).astype(np.int64)
    sizes = np.array(buckets.sizes)
    widths, heights = np.append(widths, sizes[:, 1]), np.append(heights, sizes[:, 0])
    assigned = buckets.assign(widths, heights)
    assert assigned.dtype == np.int64
    for width, height, index in zip(widths.tolist(), heights.tolist(), assigned.tolist(), strict=True):
        aspect = Fraction(width, height)
        # Distance in log as a ratio, at least 1: compared without rounding.
        ratios = [max(aspect * h / w, w / (aspect * h)) for h, w in buckets.sizes]
        assert index == ratios.index(min(ratios))
        assert buckets.nearest(width, height) == index
    assert assigned[300:].tolist() == list(range(len(sizes)))


def test_of_two_as_near_the_taller_is_taken() -> None:
    buckets = Buckets(128 * 64, 64, 2.0)
    assert buckets.sizes == [(128, 64), (64, 64), (64, 128)]
    # 1 : 2 in aspect squared lies midway between 1 : 2 and 1 : 1; no whole sides have it, so such buckets are made.
    buckets._keep([(4, 1), (1, 1), (1, 4)])
    assert buckets.sizes[buckets.nearest(1, 2)] == (4, 1)
    assert buckets.sizes[buckets.nearest(2, 1)] == (1, 1)
    assert buckets.sizes[buckets.nearest(2001, 1000)] == (1, 4)
    assert buckets.assign(np.array([1, 300, 7]), np.array([2, 600, 14])).tolist() == [0, 0, 0]


def test_millions_are_assigned_at_once() -> None:
    widths, heights = np.random.default_rng(0).integers(1, 10_000, (2, 1_000_000)).astype(np.int32)
    buckets = Buckets(1024 * 1024, 64, 2.0)
    assigned = buckets.assign(widths, heights)
    some = range(0, 1_000_000, 5000)
    assert [assigned[n] for n in some] == [buckets.nearest(int(widths[n]), int(heights[n])) for n in some]
    assert buckets.assign(widths[:0], heights[:0]).shape == (0,)


def test_single_takes_every_image() -> None:
    buckets = Buckets.single(512, 768)
    assert buckets.sizes == [(512, 768)]
    assert buckets.nearest(1, 5000) == 0
    assert buckets.assign(np.array([1, 9]), np.array([9, 1])).tolist() == [0, 0]


def test_area_below_one_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"--bucket_step 64: .*4095 pixels.*--bucket_area.*--resolution") as caught:
        Buckets(4095, 64, 2.0)
    assert "\n" not in str(caught.value)


def test_nearest_is_assign_of_one() -> None:
    buckets = Buckets(512 * 512, 64, 2.0)
    random = np.random.default_rng(0)
    widths, heights = random.integers(1, 4000, 2000), random.integers(1, 4000, 2000)
    found = [buckets.nearest(int(w), int(h)) for w, h in zip(widths, heights, strict=True)]
    assert found == buckets.assign(widths, heights).tolist()
