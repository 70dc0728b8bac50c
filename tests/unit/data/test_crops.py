"""Crops whose pixels agree with their conditioning."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from lpl.data.crops import Crop, plan_crop, render, to_float

Picture = Callable[[int, int, int], Image.Image]
SQUARE, KINDS = (32, 32), ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def test_short_side_is_resized_and_aspect_kept() -> None:
    crop = plan_crop(1500, 1000, (512, 512), True)
    assert crop == Crop((1000, 1500), (512, 768), (0, 128), (512, 512), False)
    assert crop.size_conditioning == (1000, 1500, 0, 128, 512, 512)
    assert not crop.upscaled
    assert plan_crop(100, 300, (512, 512), True).resized_size == (1536, 512)
    assert plan_crop(511, 900, (512, 512), True).upscaled
    assert plan_crop(1, 1000, (8, 8), True).resized_size == (8000, 8)


@pytest.mark.parametrize(
    ("size", "target", "resized", "top_left"),
    [
        ((1600, 1200), (832, 1216), (912, 1216), (40, 0)),
        ((1200, 1600), (832, 1216), (1621, 1216), (394, 0)),
        ((3000, 1000), (832, 1216), (832, 2496), (0, 640)),
        ((1216, 832), (832, 1216), (832, 1216), (0, 0)),
        ((2432, 1664), (832, 1216), (832, 1216), (0, 0)),
    ],
)
def test_any_target_is_covered(
    size: tuple[int, int], target: tuple[int, int], resized: tuple[int, int], top_left: tuple[int, int]
) -> None:
    crop = plan_crop(*size, target, True)
    assert crop == Crop((size[1], size[0]), resized, top_left, target, False)
    assert crop.size_conditioning == (size[1], size[0], *top_left, *target)


def test_no_smaller_size_covers_the_target() -> None:
    rng = np.random.default_rng(0)
    for width, height, target_height, target_width in rng.integers(1, 3000, (500, 4)).tolist():
        crop = plan_crop(width, height, (target_height, target_width), True)
        resized_height, resized_width = crop.resized_size
        assert resized_height >= target_height
        assert resized_width >= target_width
        assert resized_height == target_height or resized_width == target_width
        scale = max(target_height / height, target_width / width)
        assert abs(resized_height - height * scale) <= 0.5 + 1e-9
        assert abs(resized_width - width * scale) <= 0.5 + 1e-9
        assert crop.upscaled == (scale > 1 and crop.resized_size != crop.original_size)


def test_share_cropped_away() -> None:
    assert plan_crop(100, 50, (50, 50), True).cropped_away == 0.5
    assert plan_crop(1500, 1000, (512, 512), True).cropped_away == pytest.approx(1 / 3)
    assert plan_crop(1216, 832, (832, 1216), True).cropped_away == 0
    assert plan_crop(2, 4000, (32, 32), False, "key").cropped_away == pytest.approx(1 - 1 / 2000)


def test_draws_are_those_of_their_keys() -> None:
    # Written down: crops of a run that is taken up again must not move.
    assert plan_crop(1500, 1000, (512, 512), False, 0, "crop", "a", 0).top_left == (0, 100)
    assert plan_crop(1000, 1500, (512, 512), False, 0, "crop", "a", 0).top_left == (190, 0)


def test_random_crops_follow_their_key_and_reach_both_ends() -> None:
    crops = [plan_crop(40, 32, SQUARE, False, 0, "crop", "id", n) for n in range(200)]
    assert crops == [plan_crop(40, 32, SQUARE, False, 0, "crop", "id", n) for n in range(200)]
    assert {crop.top_left for crop in crops} == {(0, x) for x in range(9)}
    assert {plan_crop(32, 40, SQUARE, False, 1, n).top_left for n in range(200)} == {(y, 0) for y in range(9)}
    assert {plan_crop(30, 20, (20, 24), False, n).top_left for n in range(200)} == {(0, x) for x in range(7)}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("target", [SQUARE, (24, 40)])
@pytest.mark.parametrize(("width", "height"), [(61, 40), (40, 61), (32, 47), (32, 40), (20, 20)])
def test_flip_conditioning_matches_pixels(
    picture: Picture, center: bool, target: tuple[int, int], width: int, height: int
) -> None:
    image = picture(3, width, height)
    plain = plan_crop(width, height, target, center, 5, "crop", "a", 0)
    flipped = plan_crop(width, height, target, center, 5, "crop", "a", 0, flip=True)
    pixels = render(image, flipped, "bicubic")
    assert torch.equal(pixels, render(image, plain, "bicubic").flip(-1))

    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    as_plain = Crop(flipped.original_size, flipped.resized_size, flipped.top_left, flipped.target_size, False)
    assert (pixels.int() - render(mirrored, as_plain, "bicubic").int()).abs().max() <= 1
    assert flipped.top_left == (plain.top_left[0], plain.resized_size[1] - target[1] - plain.top_left[1])


def test_pixels_lie_where_the_crop_says() -> None:
    values = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    for flip in (False, True):
        crop = Crop((8, 12), (8, 12), (1, 3), (6, 7), flip)
        pixels = render(Image.fromarray(values), crop, "lanczos")
        seen = values[:, ::-1] if flip else values
        assert torch.equal(pixels, torch.from_numpy(seen[1:7, 3:10].copy()).permute(2, 0, 1))
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 301), (50, 33), (640, 31)])
def test_crop_alone_equals_the_whole_resized_then_cropped(picture: Picture, kind: str, width: int, height: int) -> None:
    image = picture(7, width, height)
    crop = plan_crop(width, height, (48, 64), False, kind, width)
    (resized_height, resized_width), (y, x), (rows, columns) = crop.resized_size, crop.top_left, crop.target_size
    whole = image.resize((resized_width, resized_height), Image.Resampling[kind.upper()])
    expected = np.asarray(whole)[y : y + rows, x : x + columns].astype(int)
    difference = np.abs(render(image, crop, kind).permute(1, 2, 0).numpy().astype(int) - expected)
    if kind in ("nearest", "box"):  # kernels with edges: a row or column that lies on one may fall to either side
        assert (difference > 1).mean() <= 0.03
    else:
        assert difference.max() <= 1


def test_reduction_is_antialiased() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    for kind in KINDS[1:]:
        pixels = render(Image.fromarray(stripes), plan_crop(400, 400, (50, 50), True), kind)
        assert (pixels[:, :, 2:-2].int() - 127).abs().max() <= 2


def test_extreme_aspect_costs_no_more_than_its_crop() -> None:
    levels = np.repeat(np.linspace(0, 255, 100_000).astype(np.uint8)[:, None, None], 3, 2).repeat(2, 1)
    crop = plan_crop(2, 100_000, (512, 512), True)
    assert crop.resized_size == (25_600_000, 512)
    pixels = render(Image.fromarray(levels), crop, "lanczos")
    assert pixels.shape == (3, 512, 512)
    assert (pixels.int() - 127).abs().max() <= 1


def test_interpolation_is_used(picture: Picture) -> None:
    image, crop = picture(0, 50, 50), plan_crop(50, 50, SQUARE, True)
    renders = [render(image, crop, kind) for kind in KINDS]
    assert all(not torch.equal(a, b) for n, a in enumerate(renders) for b in renders[:n])


def test_crop_of_another_image_is_refused(picture: Picture) -> None:
    with pytest.raises(ValueError, match="planned for"):
        render(picture(0, 40, 50), plan_crop(50, 40, SQUARE, True), "box")


def test_levels_become_floats() -> None:
    floats = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert floats.dtype == torch.float32
    assert torch.allclose(floats, torch.tensor([-1.0, -0.6, 1.0]))
    assert floats[0] == -1
    assert floats[2] == 1
