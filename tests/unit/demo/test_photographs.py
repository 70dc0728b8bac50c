"""The demo's photographs: what is held out stays out, captions are true, the image folder reads back."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter

import pytest
import torch
from PIL import Image

from lpl.demo import photographs
from lpl.demo.photographs import (
    IMAGE_SIZE,
    PHOTOGRAPHS,
    all_captions,
    export_data,
    load_photograph,
    locate,
    random_crops,
    split_regions,
    to_tensor,
    training_crops,
)
from tools.demo_weights import vae

HELD_OUT = {photograph.name: split_regions(photograph)[1] for photograph in PHOTOGRAPHS}


def overlaps(first: photographs.Box, second: photographs.Box) -> bool:
    """Whether two boxes share a pixel."""
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def test_training_crops_never_touch_the_held_out_strip() -> None:
    crops = training_crops() + random_crops(300, random.Random(0))
    assert len(crops) == 22 * len(PHOTOGRAPHS) + 300
    assert not [crop for crop in crops if overlaps(crop.box, HELD_OUT[crop.photograph])]


def test_patches_of_the_autoencoder_never_touch_the_held_out_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, cut = [], vae.cut
    monkeypatch.setattr(vae, "cut", lambda *given: boxes.append(given[:2]) or cut(*given))
    assert len(vae.random_patches(300, random.Random(0))) == 300
    assert len(boxes) == 300
    assert not [box for photograph, box in boxes if overlaps(box, HELD_OUT[photograph.name])]


def test_held_out_crops_lie_inside_the_strip() -> None:
    crops = vae.held_out_crops()
    assert Counter(crop.photograph for crop in crops) == {photograph.name: 8 for photograph in PHOTOGRAPHS}
    for crop in crops:
        left, upper, right, lower = HELD_OUT[crop.photograph]
        assert left <= crop.box[0] < crop.box[2] <= right
        assert upper <= crop.box[1] < crop.box[3] <= lower


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.name)
def test_held_out_strip_is_a_fifth(photograph: photographs.Photograph) -> None:
    width, height = load_photograph(photograph).size
    left, upper, right, lower = HELD_OUT[photograph.name]
    assert (right - left) * (lower - upper) / (width * height) == pytest.approx(0.2, abs=0.005)


def test_crops_are_the_same_each_time() -> None:
    first, second = training_crops(), training_crops()
    assert [crop[1:] for crop in first] == [crop[1:] for crop in second]
    assert first[0].image.tobytes() == second[0].image.tobytes()
    assert random_crops(5, random.Random(7))[4].box == random_crops(5, random.Random(7))[4].box


def test_captions_are_short_and_tell_crops_apart() -> None:
    captions = [crop.caption for crop in training_crops()]
    assert all(6 <= len(caption.split()) <= 15 for caption in all_captions())
    assert set(captions) <= set(all_captions())
    assert len(set(captions)) > 8 * len(PHOTOGRAPHS)


def test_a_caption_names_scale_and_place() -> None:
    cat = next(photograph for photograph in PHOTOGRAPHS if photograph.name == "chelsea")
    width, height = load_photograph(cat).size
    corner = photographs.cut(cat, (0, 0, 90, 90), "close-up")
    assert corner.caption == "a close-up photo of a tabby cat with green eyes, upper left"
    middle = photographs.cut(cat, (width // 2 - 45, height // 2 - 45, width // 2 + 45, height // 2 + 45), "medium")
    assert middle.caption == "a photo of a tabby cat with green eyes, centre"


def test_to_tensor_spans_minus_one_to_one() -> None:
    tensor = to_tensor([Image.new("RGB", (2, 2), (0, 255, 0))])
    assert tensor.shape == (1, 3, 2, 2)
    assert torch.equal(tensor[0, :, 0, 0], torch.tensor([-1.0, 1.0, -1.0]))


def test_export_data_reads_back(tmp_path) -> None:
    folder = export_data(tmp_path / "images")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    crops = training_crops()
    assert [row["text"] for row in rows] == [crop.caption for crop in crops]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lpl.json", *(row["file_name"] for row in rows), "metadata.jsonl"]
    )
    for row, crop in zip(rows, crops, strict=True):
        with Image.open(folder / row["file_name"]) as image:
            assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
            assert image.tobytes() == crop.image.tobytes()


@pytest.mark.parametrize("package", ["skimage", "a_package_nobody_has"])
def test_a_missing_photograph_says_what_to_install(package: str) -> None:
    missing = dataclasses.replace(PHOTOGRAPHS[0], package=package, file="data/none.png")
    with pytest.raises(RuntimeError, match=r"pip install 'latent-perceptual-loss\[demo\]'"):
        locate(missing)
