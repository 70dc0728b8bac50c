"""Where masks are found: beside images, in a folder of their own, in columns and shards."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from mask_images import blobs, messages, png
from PIL import Image

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.dataset import TrainingData
from lpl.data.masks import crop_mask
from lpl.data.sources import open_source

Encode = Callable[..., TrainingData]


def test_mask_dir_has_the_images_paths(encode: Encode, folder: Path, tmp_path: Path, encoder: Any) -> None:
    masks = tmp_path / "masks"
    (masks / "sub").mkdir(parents=True)
    blobs(3, 70, 33).save(masks / "sub" / "9.jpg", quality=95)
    blobs(4, 40, 32).convert("RGB").save(masks / "0.png")
    (masks / "0.bmp").write_bytes(b"0.png has the image's own ending")
    data = encode(masked_loss="files", mask_dir=str(masks), center_crop=True)
    assert [bool(data.samples[n].mask) for n in range(5)] == [True, False, False, False, True]
    expected = crop_mask(blobs(4, 40, 32), data.views.draw(0, "0.png", 40, 32, 0), 8)
    mask = data.batch([(0, 0)]).mask
    assert mask is not None
    assert torch.equal(mask[0], expected / 255)
    blobs(5, 40, 32).save(masks / "0.png")
    encode(masked_loss="files", mask_dir=str(masks), center_crop=True)
    assert encoder.images == 5


def config_of(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(train_data_dir=str(folder), masked_loss="files", **options)


def test_folders_without_masks_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (folder / "sub" / "masks").mkdir()
    for options, expected in (
        ({}, "--masked_loss files: no image of --train_data_dir"),
        ({"mask_dir": str(tmp_path / "gone")}, "gone: no such folder"),
        ({"mask_dir": str(tmp_path / "empty")}, "none of its 0 images has the name of a training image, such as 0.png"),
        ({"mask_dir": str(folder / "sub" / "masks")}, "lies in --train_data_dir"),
        ({"mask_dir": str(folder)}, "lies in --train_data_dir"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            open_source(config_of(folder, **options), None)
        assert "\n" not in str(caught.value)


def test_mask_files_are_no_training_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    blobs(0, 40, 32).save(folder / "0-masklabel.png")
    source = open_source(DataConfig(train_data_dir=str(folder)), None)
    assert source.size == 5
    assert "1 files end in -masklabel.png: they are masks, which only --masked_loss files uses" in messages(caplog)
    blobs(0, 40, 32).save(folder / "nobody-masklabel.png")
    with pytest.raises(UserError, match=r"1 of 6 images have no caption, first nobody-masklabel\.png"):
        open_source(DataConfig(train_data_dir=str(folder)), None)


def test_masks_of_regularisation_images(encode: Encode, masked: Path, tmp_path: Path, picture: Any) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    for n in range(2):
        picture(50 + n, 32, 32).save(reg / f"{n}.png")
        (reg / f"{n}.txt").write_text("a thing")
    left = Image.new("L", (32, 32), 0)
    left.paste(255, (0, 0, 16, 32))
    left.save(reg / "1-masklabel.png")
    data = encode(masked_loss="files", reg_data_dir=str(reg), prior_loss_weight=0.5, unmasked_weight=0.5)
    batch = data.batch([(5, 0), (6, 0), (0, 0)])
    assert batch.mask is not None
    assert batch.weights is not None
    assert (batch.mask[0] == 1).all()
    assert batch.mask[1, 0, 0].tolist() == [1, 1, 0.5, 0.5]
    assert batch.weights.tolist() == [0.5, 0.5, 1.0]


def test_masks_in_a_column(encode: Encode, tmp_path: Path) -> None:
    upper = Image.new("L", (32, 32), 0)
    upper.paste(255, (0, 0, 32, 16))
    rows = {
        "image": [{"bytes": png(Image.new("RGB", (32, 32), c)), "path": None} for c in ("red", "blue")],
        "text": ["a", "b"],
        "where": [{"bytes": png(upper), "path": None}, None],
        "number": [1, 2],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "where": datasets.Image(),
            "number": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    for streaming in (False, True):
        options = {"train_data_dir": None, "dataset_name": str(tmp_path / "x.parquet"), "streaming": streaming}
        data = encode(**options, masked_loss="files", mask_column="where")
        batch = data.batch([(0, 0), (1, 0)])
        assert batch.mask is not None
        assert batch.mask[:, 0, :, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        with pytest.raises(UserError, match=r"--mask_column gone: .* has no such column"):
            encode(**options, masked_loss="files", mask_column="gone")
        with pytest.raises(UserError, match=r"--mask_column number: .* holds .*, not images") as caught:
            encode(**options, masked_loss="files", mask_column="number")
        assert "\n" not in str(caught.value)


def test_masks_in_shards(encode: Encode, tmp_path: Path) -> None:
    upper = Image.new("L", (32, 32), 0)
    upper.paste(255, (0, 0, 32, 16))
    members = {"a.png": png(Image.new("RGB", (32, 32), "red")), "a.txt": b"a", "a.mask.png": png(upper)}
    members |= {"b.png": png(Image.new("RGB", (32, 32), "blue")), "b.txt": b"b"}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    options = {"train_data_dir": None, "webdataset": str(tmp_path / "x.tar")}
    batch = encode(**options, masked_loss="files").batch([(0, 0), (1, 0)])
    assert batch.mask is not None
    assert batch.mask[:, 0, :, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert encode(**options).batch([(0, 0)]).mask is None


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"--unmasked_weight must lie in 0\.\.1, not 1\.5"):
        DataConfig(unmasked_weight=1.5)
    with pytest.raises(UserError, match="--mask_column"):
        DataConfig(dataset_name="x", masked_loss="files")
