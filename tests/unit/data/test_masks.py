"""Masks: through which crop they go, what a batch has of them, and which are refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_images import blobs, messages, png
from PIL import Image

from lpl.base.errors import UserError
from lpl.data.bad_files import BadImageError
from lpl.data.crops import Crop
from lpl.data.dataset import TrainingData
from lpl.data.masks import crop_mask, decode_mask, location_weights

Encode = Callable[..., TrainingData]


@pytest.mark.parametrize(
    "options",
    [
        {"crop_variants": 3, "random_flip": True},
        {"center_crop": True, "random_flip": True},
        {"buckets": True, "bucket_step": 8, "random_flip": True},
        {"resolution": 64},
    ],
)
@pytest.mark.parametrize("kind", ["files", "alpha"])
def test_mask_follows_the_crop_of_its_image(
    encode: Encode, folder: Path, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Images that are their own masks: white where they are opaque or marked, black elsewhere."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            mask = blobs(len(path.name), *image.size)
        if kind == "alpha":
            Image.merge("LA", (Image.new("L", mask.size, 255), mask)).save(path)
        else:
            mask.save(path)
            mask.save(path.with_name(f"{path.stem}-masklabel.png"))
    data = encode(masked_loss=kind, background_color="black", image_interpolation_mode="bilinear", **options)
    flips = set()
    for index in range(len(data)):
        for count in range(6):
            row = data.samples[index]
            flips.add(data.views.draw(0, row.id, row.width, row.height, count).flip)
            batch = data.batch([(index, count)])
            key = data.views.key(row.digest, data.views.draw(0, row.id, row.width, row.height, count))
            brightness = (data.caches.latents.gather([key])["mean"][:, :1] + 1) / 2
            assert batch.mask is not None
            assert batch.mask.shape == (1, 1, *batch.raw_latents.shape[2:])
            assert batch.mask.dtype == torch.float32
            assert (batch.mask - brightness).abs().max() < 1.5 / 255
            assert batch.mask.std() > 0.05
    assert flips == ({False, True} if "random_flip" in options else {False})


def test_mask_is_the_mean_over_each_latents_pixels() -> None:
    values = np.arange(24 * 32).reshape(24, 32) % 251
    crop = Crop((24, 32), (24, 32), (8, 16), (16, 16), False)
    made = crop_mask(Image.fromarray(values.astype(np.uint8)), crop, 8)
    expected = values[8:, 16:].reshape(2, 8, 2, 8).mean((1, 3)).round()
    assert made.dtype == torch.uint8
    assert made.tolist() == [expected.tolist()]
    mirrored = crop_mask(Image.fromarray(values.astype(np.uint8)), Crop((24, 32), (24, 32), (8, 0), (16, 16), True), 8)
    assert mirrored.tolist() == [expected[:, ::-1].tolist()]


def test_location_weights() -> None:
    stored = torch.tensor([[255, 0, 51, 102], [0, 0, 0, 0], [0, 0, 0, 102]], dtype=torch.uint8).view(3, 1, 2, 2)
    weights, samples = location_weights(stored, 0.25)
    assert weights[0].flatten().tolist() == pytest.approx([1, 0.25, 0.4, 0.55])
    assert samples.tolist() == pytest.approx([1, 0.25, 0.55])
    assert location_weights(stored, 0.0)[1].tolist() == pytest.approx([1, 0, 0.4])


def test_masks_of_a_batch(encode: Encode, masked: Path) -> None:
    data = encode(masked_loss="files", center_crop=True, resolution=32)
    assert len(data) == 5
    batch = data.batch([(1, 0), (0, 0), (4, 0)])
    assert batch.mask is not None
    assert batch.weights is not None
    white = torch.ones(4, 4)
    upper = torch.cat([torch.ones(2, 4), torch.zeros(2, 4)])
    assert torch.equal(batch.mask[0, 0], white)
    assert torch.equal(batch.mask[1, 0], upper)
    assert (batch.mask[2, 0, :, 1:] == 0).all()  # of 68 columns, 18 to 49: only the first two are marked
    assert 0 < batch.mask[2, 0, 0, 0] < 0.3
    assert batch.weights.tolist() == [1, 1, batch.mask[2].max().item()]
    unmasked = data.batch([(1, 0), (2, 5)])
    assert unmasked.mask is None
    assert unmasked.weights is None


def test_files_and_alpha_do_not_share_masks(encode: Encode, folder: Path) -> None:
    image = Image.new("RGBA", (40, 32), (255, 255, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 40, 16))
    image.save(folder / "0.png")
    (folder / "0-masklabel.png").write_bytes((folder / "0.png").read_bytes())  # red on black: 76 of 255
    options = {"center_crop": True, "unmasked_weight": 0.0}
    by_file = encode(masked_loss="files", **options).batch([(0, 0)]).mask
    by_alpha = encode(masked_loss="alpha", **options).batch([(0, 0)]).mask
    assert by_file is not None
    assert by_alpha is not None
    assert by_alpha[0, 0, :, 0].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(by_file[0, 0, :, 0], torch.tensor([76, 76, 0, 0]) / 255)


def test_alpha_shows_the_background_and_opaque_images_have_no_mask(
    encode: Encode, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lpl")
    Image.new("RGBA", (40, 32), (255, 0, 0, 255)).save(folder / "1.png")
    clear = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 32, 8))
    clear.save(folder / "2.png")
    data = encode(masked_loss="alpha", background_color="black")
    assert "1 of 5 images have a mask" in messages(caplog)
    (key,) = data.views.crops("2.png", data.samples[2].digest, 32, 32)
    mean = data.caches.latents.gather([key])["mean"][0, 0]
    assert mean[:, 0].tolist() == [1, -1, -1, -1]
    mask = data.batch([(2, 0)]).mask
    assert mask is not None
    assert mask[0, 0, :, 0].tolist() == [1, 0, 0, 0]
    assert data.batch([(1, 0)]).mask is None


def test_none_with_alpha_is_said(encode: Encode, caplog: pytest.LogCaptureFixture) -> None:
    encode(masked_loss="alpha")
    assert "--masked_loss alpha: 0 of 5 images have a mask" in messages(caplog)


def test_mask_of_a_turned_image_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    image = Image.new("L", (20, 10), 0)
    image.paste(255, (0, 0, 10, 10))  # left becomes top
    mask = np.asarray(decode_mask(png(image, exif=exif), (10, 20)))
    assert (mask[:10] == 255).all()
    assert (mask[10:] == 0).all()


def test_turned_image_with_alpha(encode: Encode, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.save(folder / "1.png", exif=exif)
    mask = encode(masked_loss="alpha").batch([(1, 0)]).mask
    assert mask is not None
    assert mask[0, 0].tolist() == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]


@pytest.mark.parametrize(("size", "good"), [((20, 16), True), ((80, 64), True), ((21, 16), True), ((32, 40), False)])
def test_masks_of_another_size(size: tuple[int, int], good: bool) -> None:
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    if not good:
        with pytest.raises(BadImageError) as caught:
            decode_mask(png(image), (40, 32))
        assert caught.value.reason == "its mask is 32 x 40 pixels, of another aspect than the image's 40 x 32"
        return
    mask = np.asarray(decode_mask(png(image), (40, 32)))
    assert mask.shape == (32, 40)
    assert (mask[:, :17] == 255).all()
    assert (mask[:, 23:] == 0).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(Image.new("L", (40, 32), 0)), "its mask is black everywhere"),
        (png(Image.new("RGBA", (40, 32), (255, 255, 255, 0))), "its mask is black everywhere"),
        (b"", "its mask: the file is empty"),
        (png(blobs(0, 40, 32))[:60], "its mask: PNG"),
        (png(Image.new("L", (32, 40), 255)), "of another aspect"),
    ],
    ids=["black", "transparent", "empty", "cut short", "aspect"],
)
def test_bad_masks_are_listed_with_the_reason(
    encode: Encode, masked: Path, tmp_path: Path, data: bytes, reason: str
) -> None:
    (masked / "0-masklabel.png").write_bytes(data)
    with pytest.raises(UserError, match=r"1 of 5 images cannot be used, first .*0\.png \(its mask"):
        encode(masked_loss="files", max_bad_fraction=0)
    found = encode(masked_loss="files", max_bad_fraction=0.2)
    assert [found.samples[n].id for n in range(4)] == ["1.png", "2.png", "3.png", "sub/9.png"]
    (line,) = map(json.loads, (tmp_path / "bad_files.jsonl").read_text().splitlines())
    assert line["id"] == "0.png"
    assert reason in line["reason"]
    assert len(encode()) == 5  # without masks the image is sound
    Image.new("L", (40, 32), 255).save(masked / "0-masklabel.png")
    assert len(encode(masked_loss="files")) == 5


def test_transparent_image_is_bad(encode: Encode, folder: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (40, 32), (1, 2, 3, 0)).save(folder / "0.png")
    assert len(encode(masked_loss="alpha", max_bad_fraction=0.2)) == 4
    assert "transparent everywhere" in (tmp_path / "bad_files.jsonl").read_text()
