"""Decoding of every kind of image, and crops whose pixels agree with their conditioning."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lpl.data.transforms import Crop, decode_image, image_size, plan_crop, render
from lpl.errors import UserError

Picture = Callable[[int, int, int], Image.Image]


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    assert image.size == image_size(data, "x")
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    # What a viewer must see: red top left, green top right, blue bottom left, white bottom right; 40 wide, 20 high.
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20], upright[:10, 20:], upright[10:, :20], upright[10:, 20:] = [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip
    # How a camera stores it, from the EXIF standard: where row 0 and column 0 of the stored image are seen.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact: dict[str, dict[str, Any]] = {"jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    seen = decoded(encoded(image, kind, exif=exif.tobytes(), **exact.get(kind, {})))
    assert seen.shape == (20, 40, 3)
    for y, x in ((5, 10), (5, 30), (15, 10), (15, 30)):
        assert np.abs(seen[y, x].astype(int) - upright[y, x]).max() <= 3, (kind, orientation)


def test_size_of_a_png_is_read_without_decoding(picture: Picture) -> None:
    assert image_size(encoded(picture(0, 300, 200))[:400], "x") == (300, 200)


def test_alpha_lies_on_white() -> None:
    rgba = Image.new("RGBA", (2, 1))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (100, 0, 200, 128))
    pixels = decoded(encoded(rgba))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    expected = [c * 128 / 255 + 255 * 127 / 255 for c in (100, 0, 200)]
    assert np.abs(pixels[0, 1] - np.array(expected)).max() <= 1
    assert decoded(encoded(Image.new("LA", (1, 1), (0, 0))))[0, 0].tolist() == [255, 255, 255]


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert decoded(encoded(palette))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert decoded(encoded(palette, transparency=0))[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_transparent_colour_of_rgb() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert decoded(encoded(image, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    data = encoded(Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)), kind)
    assert decoded(data)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_wide_integers_and_floats() -> None:
    assert decoded(encoded(Image.fromarray(np.array([[0, 65535]], np.int32)), "tiff"))[0, 1].tolist() == [255] * 3
    assert decoded(encoded(Image.fromarray(np.array([[0.2, 1]], np.float32)), "tiff"))[0, 0].tolist() == [51] * 3
    for values in (np.array([[70000]], np.int32), np.array([[-0.5]], np.float32), np.array([[np.nan]], np.float32)):
        with pytest.raises(UserError, match=r"odd\.tif: grey values"):
            decode_image(encoded(Image.fromarray(values), "tiff"), "odd.tif")


def test_grey_one_bit_and_cmyk() -> None:
    assert decoded(encoded(Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77] * 3
    assert decoded(encoded(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3
    cmyk = decoded(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "jpeg", quality=100))[4, 4].astype(int)
    assert np.abs(cmyk - [0, 255, 255]).max() <= 4


def test_colour_profile_is_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decoded(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), icc_profile=profile))[0, 0].tolist() == [9, 8, 7]


def test_faulty_exif_does_not_cost_the_image() -> None:
    data = encoded(Image.new("RGB", (9, 7), (50, 60, 70)), "jpeg", exif=b"Exif\0\0garbage")
    assert decoded(data).shape == (7, 9, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_files_that_cannot_be_decoded_are_named(picture: Picture, kind: str) -> None:
    data = encoded(picture(0, 64, 64), kind)
    for broken in (data[: len(data) // 2], b"", b"not an image", data[:10]):
        with pytest.raises(UserError, match=r"^photo: cannot be decoded .*replace or remove it$") as caught:
            decode_image(broken, "photo")
        assert "\n" not in str(caught.value)


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for function in (decode_image, image_size):
        with pytest.raises(UserError, match="bomb: cannot be decoded"):
            function(data, "bomb")


def test_short_side_is_resized_and_aspect_kept() -> None:
    crop = plan_crop(1500, 1000, 512, True)
    assert crop == Crop((1000, 1500), (512, 768), (0, 128), (512, 512), False)
    assert crop.size_conditioning == (1000, 1500, 0, 128, 512, 512)
    assert not crop.upscaled
    assert plan_crop(100, 300, 512, True).resized_size == (1536, 512)
    assert plan_crop(511, 900, 512, True).upscaled
    assert plan_crop(1, 1000, 8, True).resized_size == (8000, 8)


def test_random_crops_follow_their_key_and_reach_both_ends() -> None:
    crops = [plan_crop(40, 32, 32, False, 0, "crop", "id", n) for n in range(200)]
    assert crops == [plan_crop(40, 32, 32, False, 0, "crop", "id", n) for n in range(200)]
    assert {crop.top_left for crop in crops} == {(0, x) for x in range(9)}
    assert {plan_crop(32, 40, 32, False, 1, n).top_left for n in range(200)} == {(y, 0) for y in range(9)}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("width", "height"), [(61, 40), (40, 61), (32, 47)])
def test_flip_conditioning_matches_pixels(picture: Picture, center: bool, width: int, height: int) -> None:
    image = picture(3, width, height)
    plain = plan_crop(width, height, 32, center, 5, "crop", "a", 0)
    flipped = plan_crop(width, height, 32, center, 5, "crop", "a", 0, flip=True)
    pixels = render(image, flipped, "bicubic")
    assert torch.equal(pixels, render(image, plain, "bicubic").flip(-1))

    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    as_plain = Crop(flipped.original_size, flipped.resized_size, flipped.top_left, flipped.target_size, False)
    assert (pixels - render(mirrored, as_plain, "bicubic")).abs().max() <= 2.01 / 255
    assert flipped.top_left == (plain.top_left[0], plain.resized_size[1] - 32 - plain.top_left[1])


def test_pixels_lie_where_the_crop_says() -> None:
    values = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    crop = Crop((8, 12), (8, 12), (0, 3), (8, 8), False)
    pixels = render(Image.fromarray(values), crop, "lanczos")
    expected = torch.from_numpy(values[:, 3:11].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels, expected)
    assert pixels.dtype == torch.float32
    assert render(Image.new("RGB", (8, 8)), plan_crop(8, 8, 8, True), "box").unique().tolist() == [-1.0]
    assert render(Image.new("RGB", (8, 8), "white"), plan_crop(8, 8, 8, True), "box").unique().tolist() == [1.0]


def test_interpolation_is_used(picture: Picture) -> None:
    image, crop = picture(0, 50, 50), plan_crop(50, 50, 32, True)
    kinds = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
    renders = [render(image, crop, kind) for kind in kinds]
    assert all(not torch.equal(a, b) for n, a in enumerate(renders) for b in renders[:n])


def test_crop_of_another_image_is_refused(picture: Picture) -> None:
    with pytest.raises(ValueError, match="planned for"):
        render(picture(0, 40, 50), plan_crop(50, 40, 32, True), "box")


def test_avif(picture: Picture, tmp_path: Path) -> None:
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    image = picture(1, 48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encoded(image, "avif", exif=exif.tobytes())).shape == (48, 32, 3)
