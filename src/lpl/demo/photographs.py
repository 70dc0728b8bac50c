"""Photographs that scikit-image and scikit-learn ship, cut into captioned crops of 64 pixels.

A strip of a fifth of each photograph's width or height is held out: crops for training never touch it, and its crops
measure how well the autoencoder generalises. Captions name the subject, the scale and the place of a crop in its
photograph, so captioned crops are not mirrored: left and right would be wrong.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from lpl.base.files import alone_in
from lpl.base.output_folder import OutputFolder

IMAGE_SIZE = 64
WORKING_SIZE = 640  # longest side a photograph is shrunk to before it is cut
HELD_OUT_FRACTION = 0.2
HELD_OUT_GAP = 4  # pixels between the two regions: resampling mixes neighbours
SCALES = ("wide", "medium", "close-up")
SCALE_RANGES = {"wide": (0.65, 0.85), "medium": (0.42, 0.58), "close-up": (0.22, 0.32)}  # of the region's shorter side
CROPS_PER_PHOTOGRAPH = {"wide": 4, "medium": 8, "close-up": 10}

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels of the shrunk photograph, as PIL takes them."""


STAGED = ".lpl-export"


@contextmanager
def replacing(folder: str | Path, flag: str) -> Iterator[Path]:
    """Yields a folder to write into; its content then replaces the previous export.

    Raises:
        UserError: another file has one of the names; it is left as it is.
    """
    with alone_in(Path(folder), flag):
        staged = Path(folder) / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            OutputFolder(folder, "lpl demo", flag=flag).put({path.name: path for path in sorted(staged.iterdir())})
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@dataclass(frozen=True)
class Photograph:
    """One shipped photograph: where its file is, what it shows, and which side is held out."""

    name: str
    package: Literal["skimage", "sklearn"]
    file: str
    subject: str
    held_out: Literal["left", "right", "top", "bottom"]


class Crop(NamedTuple):
    """A square cut out of a photograph and resized to 64 pixels."""

    image: Image.Image
    caption: str
    photograph: str
    box: Box


PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "an astronaut in an orange space suit", "left"),
    Photograph("camera", "skimage", "data/camera.png", "a man behind a camera on a tripod", "right"),
    Photograph("chelsea", "skimage", "data/chelsea.png", "a tabby cat with green eyes", "right"),
    Photograph("coffee", "skimage", "data/coffee.png", "a cup of espresso on a red saucer", "right"),
    Photograph("coins", "skimage", "data/coins.png", "ancient coins in rows on a dark cloth", "right"),
    Photograph("hubble", "skimage", "data/hubble_deep_field.jpg", "distant galaxies in a black sky", "right"),
    Photograph("ihc", "skimage", "data/ihc.png", "stained brown tissue under a microscope", "right"),
    Photograph("moon", "skimage", "data/moon.png", "craters on the grey moon", "top"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png", "a red motorcycle in a garage", "left"),
    Photograph("retina", "skimage", "data/retina.jpg", "the red retina of an eye", "right"),
    Photograph("rocket", "skimage", "data/rocket.jpg", "a rocket on its launch pad at dusk", "right"),
    Photograph("china", "sklearn", "datasets/images/china.jpg", "a Chinese pagoda above a lake", "right"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "an orange dahlia in bloom", "bottom"),
)


def locate(photograph: Photograph) -> Path:
    """Path of a photograph's file inside the installed package, found without importing that package.

    Raises:
        RuntimeError: if the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(photograph.package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / photograph.file
        if path.is_file():
            return path
    raise RuntimeError(
        f"{photograph.package}'s {photograph.file} was not found: pip install 'latent-perceptual-loss[demo]'"
    )


@functools.cache
def load_photograph(photograph: Photograph) -> Image.Image:
    """The photograph as RGB, shrunk so that its longest side is at most 640 pixels."""
    with Image.open(locate(photograph)) as file:
        image = file.convert("RGB")
    scale = WORKING_SIZE / max(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def split_regions(photograph: Photograph) -> tuple[Box, Box]:
    """The region crops for training are cut from, and the held-out strip."""
    width, height = load_photograph(photograph).size
    strip_w, strip_h = round(width * HELD_OUT_FRACTION), round(height * HELD_OUT_FRACTION)
    if photograph.held_out == "left":
        return (strip_w + HELD_OUT_GAP, 0, width, height), (0, 0, strip_w, height)
    if photograph.held_out == "right":
        return (0, 0, width - strip_w - HELD_OUT_GAP, height), (width - strip_w, 0, width, height)
    if photograph.held_out == "top":
        return (0, strip_h + HELD_OUT_GAP, width, height), (0, 0, width, strip_h)
    return (0, 0, width, height - strip_h - HELD_OUT_GAP), (0, height - strip_h, width, height)


def caption_of(photograph: Photograph, scale: str, place: str) -> str:
    """For example "a close-up photo of a tabby cat with green eyes, upper left"."""
    kind = "photo" if scale == "medium" else f"{scale} photo"
    return f"a {kind} of {photograph.subject}, {place}"


def all_captions() -> list[str]:
    """Every caption that can occur: all photographs, scales and places."""
    rows, columns = ("upper", "", "lower"), ("left", "centre", "right")
    places = [f"{row} {column}".strip() for row in rows for column in columns]
    return [caption_of(photograph, scale, place) for photograph in PHOTOGRAPHS for scale in SCALES for place in places]


def _place_of(box: Box, size: tuple[int, int]) -> str:
    column = min(int(3 * (box[0] + box[2]) / (2 * size[0])), 2)
    row = min(int(3 * (box[1] + box[3]) / (2 * size[1])), 2)
    return f"{('upper', '', 'lower')[row]} {('left', 'centre', 'right')[column]}".strip()


def cut(photograph: Photograph, box: Box, scale: str) -> Crop:
    """The box of a photograph, resized and captioned."""
    image = load_photograph(photograph)
    # cropped first: with resize(box=...) the filter would read beyond the edge of the box
    pixels = image.crop(box).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return Crop(pixels, caption_of(photograph, scale, _place_of(box, image.size)), photograph.name, box)


def random_box(region: Box, side: int, rng: random.Random) -> Box:
    """A square within a region."""
    left = rng.randint(region[0], region[2] - side)
    upper = rng.randint(region[1], region[3] - side)
    return (left, upper, left + side, upper + side)


def shorter_side(region: Box) -> int:
    """The shorter side of a region, in pixels."""
    return min(region[2] - region[0], region[3] - region[1])


def _random_crop(photograph: Photograph, scale: str, rng: random.Random) -> Crop:
    region, _ = split_regions(photograph)
    side = round(shorter_side(region) * rng.uniform(*SCALE_RANGES[scale]))
    return cut(photograph, random_box(region, max(side, IMAGE_SIZE), rng), scale)


def training_crops() -> list[Crop]:
    """The fixed training set: 22 captioned crops of each photograph, the same on every machine."""
    crops = []
    for photograph in PHOTOGRAPHS:
        rng = random.Random(f"training {photograph.name}")
        crops += [_random_crop(photograph, s, rng) for s, count in CROPS_PER_PHOTOGRAPH.items() for _ in range(count)]
    return crops


def random_crops(count: int, rng: random.Random) -> list[Crop]:
    """Captioned crops drawn from the training regions, with the scales of `training_crops` at its proportions."""
    weights = list(CROPS_PER_PHOTOGRAPH.values())
    return [_random_crop(rng.choice(PHOTOGRAPHS), rng.choices(SCALES, weights)[0], rng) for _ in range(count)]


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size as a float32 tensor (B, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0


def export_data(folder: str | Path) -> Path:
    """Write the training crops as an image folder: PNG files and metadata.jsonl (file_name, text); returns the folder.

    Raises:
        RuntimeError: if scikit-image or scikit-learn is not installed.
        UserError: it holds something else under these names.
    """
    counts = dict.fromkeys((photograph.name for photograph in PHOTOGRAPHS), 0)
    named = {}
    for crop in training_crops():
        named[f"{crop.photograph}_{counts[crop.photograph]:02d}.png"] = crop
        counts[crop.photograph] += 1
    return export_crops(named, folder, "--export_data")


def export_crops(crops: Mapping[str, Crop], folder: str | Path, flag: str) -> Path:
    """Write crops as an image folder; crops by file name.

    Raises:
        UserError: the folder, which the flag names, holds something else under these names.
    """
    with replacing(folder, flag) as staged:
        for name, crop in crops.items():
            crop.image.save(staged / name)
        rows = [json.dumps({"file_name": name, "text": crop.caption}) for name, crop in crops.items()]
        (staged / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Path(folder)
