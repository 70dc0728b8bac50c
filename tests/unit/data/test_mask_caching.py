"""Masks in the cache: what is made once, what anew, and that runs without masks see nothing of it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lpl.config import DataConfig
from lpl.data import staging
from lpl.data.dataset import TrainingData
from lpl.data.prepare import Processes, prepare_data
from lpl.data.sources import open_source

Encode = Callable[..., TrainingData]


def contents(folder: Path, kinds: tuple[str, ...] = ("latents", "text", "catalogues", "masks")) -> dict[str, bytes]:
    files = [path for kind in kinds for path in (folder / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def messages(caplog: pytest.LogCaptureFixture) -> str:
    text = "\n".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return text


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


def test_unmasked_weight_enters_at_the_draw(encode: Encode, encoder: Any, masked: Path, tmp_path: Path) -> None:
    plain = encode(masked_loss="files", center_crop=True).batch([(0, 0), (4, 0)])
    before = contents(tmp_path / "c")
    batch = encode(masked_loss="files", center_crop=True, unmasked_weight=0.2).batch([(0, 0), (4, 0)])
    assert plain.mask is not None
    assert batch.mask is not None
    assert batch.weights is not None
    torch.testing.assert_close(batch.mask, plain.mask + (1 - plain.mask) * 0.2)
    assert batch.weights.tolist() == batch.mask.amax((1, 2, 3)).tolist()
    assert encoder.images == 5
    assert contents(tmp_path / "c") == before


def test_caches_of_runs_without_masks_stay_and_are_used(
    encode: Encode, encoder: Any, masked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lpl")
    encode(random_flip=True)
    assert "2 files end in -masklabel.png" in messages(caplog)
    before = contents(tmp_path / "c")
    digest = encode(random_flip=True).samples.digest()
    messages(caplog)
    data = encode(random_flip=True, masked_loss="files")
    assert "2 of 5 images have a mask, the others count whole; 4 masks made" in messages(caplog)
    assert (encoder.images, len(encoder.captions)) == (10, 5)
    assert data.samples.digest() != digest
    after = contents(tmp_path / "c")
    assert after.items() >= before.items()
    assert len(list((tmp_path / "c" / "masks").glob("stride-8-2/*.safetensors"))) == 1
    assert encode(random_flip=True).samples.digest() == digest
    assert encode(random_flip=True).batch([(0, 0)]).mask is None


def test_second_start_opens_nothing_and_one_changed_mask_is_made_again(
    encode: Encode, encoder: Any, masked: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpl.data.sources import folder as folder_module

    opened: list[str] = []
    read_file = folder_module.read_file
    monkeypatch.setattr(folder_module, "read_file", lambda path: (opened.append(Path(path).name), read_file(path))[1])
    caplog.set_level(logging.INFO, "lpl")
    first = encode(masked_loss="files", center_crop=True)
    assert len(opened) == 7
    messages(caplog)
    opened.clear()
    again = encode(masked_loss="files", center_crop=True)
    assert opened == []
    assert "0 masks made" in messages(caplog)
    assert again.samples.digest() == first.samples.digest()
    lower = Image.new("L", (40, 32), 0)
    lower.paste(255, (0, 16, 40, 32))
    lower.save(masked / "0-masklabel.png")
    changed = encode(masked_loss="files", center_crop=True)
    assert sorted(opened) == ["0-masklabel.png", "0.png"]
    text = messages(caplog)
    assert "0 crops and 0 captions encoded" in text
    assert "1 masks made" in text
    assert encoder.images == 5
    assert changed.samples.digest() != first.samples.digest()
    batch = changed.batch([(0, 0)])
    assert batch.mask is not None
    assert batch.mask[0, 0, :, 0].tolist() == [0, 0, 1, 1]
    (masked / "0-masklabel.png").unlink()
    assert encode(masked_loss="files", center_crop=True).batch([(0, 0)]).mask is None


def test_what_a_killed_run_leaves_becomes_the_same_store(
    encode: Encode, masked: Path, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MASKS_AT_ONCE", 1)
    options = {"masked_loss": "files", "crop_variants": 3, "random_flip": True, "dataloader_num_workers": 0}
    encode(latent_cache_dir=str(tmp_path / "whole"), **options)
    config = DataConfig(train_data_dir=str(masked), resolution=32, latent_cache_dir=str(tmp_path / "c"), **options)
    calls = iter(range(4))

    def proceed() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(
            *(open_source(config, None), None, config, encoder, 0, tmp_path / "bad.jsonl"),
            Processes(0, 1, lambda: None, proceed),
        )
    assert list((tmp_path / "c" / "staged").glob("*/*/masks/*"))
    encode(**options)
    assert contents(tmp_path / "c", ("masks",)) == contents(tmp_path / "whole", ("masks",)) != {}
