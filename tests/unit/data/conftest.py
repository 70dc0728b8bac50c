"""Fixtures for the data tests: small image folders, and an encoder that is a plain function of its input."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lpl.config import DataConfig
from lpl.data.dataset import TrainingData
from lpl.data.prepare import Processes, prepare_data
from lpl.data.sources import folder as folder_module
from lpl.data.sources import open_regularisation, open_source


class FakeEncoder:
    """Pools pixels by 8 and hashes captions, and counts what it has encoded."""

    def __init__(self) -> None:
        self.latent_key, self.latent_stride = "a" * 32, 8
        self.text_key = "b" * 32
        self.images = 0
        self.captions: list[str] = []
        self.batch_sizes: list[int] = []

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(pixels)
        self.batch_sizes.append(len(pixels))
        pooled = avg_pool2d(pixels, 8)
        mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)
        return mean, 0.1 + 0.01 * mean.abs()

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        return 2 * 4 * 4 * (height // 8) * (width // 8), 4 * (8 * 4 + 5)

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        self.captions += captions
        rows = [list(hashlib.sha256(caption.encode()).digest()) for caption in captions]
        embeds = torch.tensor(rows, dtype=torch.float32) / 255
        return {"prompt_embeds": embeds.reshape(len(captions), 8, 4), "pooled": embeds[:, :5]}


def noise_image(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def picture() -> Callable[[int, int, int], Image.Image]:
    """Makes an RGB image of noise from (seed, width, height)."""
    return noise_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five captioned images of different shapes, one of them nested."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for n, (width, height) in enumerate([(40, 32), (32, 32), (32, 50), (64, 48)]):
        noise_image(n, width, height).save(root / f"{n}.png")
        (root / f"{n}.txt").write_text(f"caption {n}\n")
    noise_image(9, 70, 33).save(root / "sub" / "9.png")
    (root / "sub" / "9.txt").write_text("caption 9")
    return root


@pytest.fixture
def encode(folder: Path, tmp_path: Path, encoder: FakeEncoder) -> Callable[..., TrainingData]:
    """Encodes the folder with the fake encoder; keywords are options of the data, seed and processes."""

    def run(seed: int = 0, index: int = 0, processes: int = 1, **options: Any) -> TrainingData:
        defaults: dict[str, Any] = {
            "train_data_dir": str(folder),
            "resolution": 32,
            "latent_cache_dir": str(tmp_path / "c"),
        }
        config = DataConfig(**defaults | options)
        sources = open_source(config, None), open_regularisation(config)
        return prepare_data(
            *sources, config, encoder, seed, tmp_path / "bad_files.jsonl", Processes(index, processes, lambda: None)
        )

    return run


@pytest.fixture
def masked(folder: Path) -> Path:
    """The folder with masks for 0.png and sub/9.png: the upper half, and the left 20 of 70 columns."""
    upper = Image.new("L", (40, 32), 0)
    upper.paste(255, (0, 0, 40, 16))
    upper.save(folder / "0-masklabel.png")
    left = Image.new("L", (70, 33), 0)
    left.paste(255, (0, 0, 20, 33))
    left.save(folder / "sub" / "9-masklabel.png")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are read from here on."""
    names: list[str] = []
    read_file = folder_module.read_file

    def watched(path: str) -> bytes:
        names.append(Path(path).name)
        return read_file(path)

    monkeypatch.setattr(folder_module, "read_file", watched)
    return names
