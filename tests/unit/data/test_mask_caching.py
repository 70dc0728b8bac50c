"""Masks in the cache: what is made once, what anew, and that runs without masks see nothing of it."""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_images import messages
from PIL import Image

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data import filling, prepare
from lpl.data.dataset import TrainingData
from lpl.data.prepare import Processes, prepare_data
from lpl.data.sources import folder as folder_module
from lpl.data.sources import open_source
from lpl.data.upkeep import prune_cache, verify_cache

Encode = Callable[..., TrainingData]


def contents(folder: Path, kinds: tuple[str, ...] = ("latents", "text", "catalogues", "masks")) -> dict[str, bytes]:
    files = [path for kind in kinds for path in (folder / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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
    assert len(list((tmp_path / "c" / "masks").glob("stride-8-3/*.safetensors"))) == 1
    assert encode(random_flip=True).samples.digest() == digest
    assert encode(random_flip=True).batch([(0, 0)]).mask is None


def test_second_start_opens_nothing_and_one_changed_mask_is_made_again(
    encode: Encode, encoder: Any, masked: Path, caplog: pytest.LogCaptureFixture, opened: list[str]
) -> None:
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
    monkeypatch.setattr(filling, "MASKS_AT_ONCE", 1)
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


def test_crops_that_miss_the_mark_are_said(encode: Encode, masked: Path, caplog: pytest.LogCaptureFixture) -> None:
    corner = Image.new("L", (70, 33), 0)
    corner.paste(255, (0, 0, 8, 33))
    corner.save(masked / "sub" / "9-masklabel.png")
    encode(masked_loss="files", center_crop=True, unmasked_weight=0.1)
    text = messages(caplog)
    assert "1 of the 2 masks made leave nothing in their crop: drawing it has the weight 0.1" in text
    batch = encode(masked_loss="files", center_crop=True, unmasked_weight=0.1).batch([(4, 0)])
    assert batch.weights is not None
    assert batch.weights.tolist() == pytest.approx([0.1])


def test_room_is_not_asked_for_latents_that_are_there(
    encode: Encode, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = prepare.shutil.disk_usage
    encode()
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage(path)._replace(free=100))
    assert len(encode(masked_loss="files")) == 5
    with pytest.raises(UserError, match="GiB are needed"):
        encode(masked_loss="files", latent_cache_dir=str(tmp_path / "new"))


def test_masks_are_verified_and_pruned(
    encode: Encode, encoder: Any, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "c"
    encode(masked_loss="files")
    verify_cache(str(cache), delete=False)
    assert capsys.readouterr().out == f"{cache}: 7 files, 0 damaged\n"
    (shard,) = cache.glob("masks/*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.write_bytes(content)
    verify_cache(str(cache), delete=True)
    assert "7 files, 1 damaged and removed" in capsys.readouterr().out
    assert encode(masked_loss="files").batch([(0, 0)]).mask is not None
    assert encoder.images == 5
    then = time.time() - 40 * 86400
    for path in cache.rglob("*"):
        os.utime(path, (then, then))
    encode()  # uses all but the masks
    prune_cache(str(cache), 30, dry_run=False)
    assert not list(cache.glob("masks/*/*"))
    encode(masked_loss="files")
    assert encoder.images == 5


def test_two_processes_share_the_masks(
    masked: Path, tmp_path: Path, encoder: Any, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "PIECE_SIZE", 10)
    for n in range(15):
        picture(n, 8, 8).save(masked / f"x{n:03}.bmp")
        (masked / f"x{n:03}.txt").write_text("x")
        mask = Image.new("L", (8, 8), 0)
        mask.paste(255, (0, 0, 1 + n % 8, 8))
        mask.save(masked / f"x{n:03}-masklabel.png")
    config = DataConfig(
        train_data_dir=str(masked), resolution=8, masked_loss="files", latent_cache_dir=str(tmp_path / "c")
    )
    barrier = threading.Barrier(2)

    def run(rank: int) -> TrainingData:
        processes = Processes(rank, 2, lambda: barrier.wait() and None)
        return prepare_data(open_source(config, None), None, config, encoder, 0, tmp_path / "bad.jsonl", processes)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    draws = [(index, 0) for index in range(len(first))]
    one, other = first.batch(draws), second.batch(draws)
    assert one.mask is not None
    assert other.mask is not None
    assert torch.equal(one.mask, other.mask)
    ids = [first.samples[index].id for index in range(len(first))]
    assert one.mask[ids.index("x011.bmp")].item() == pytest.approx(0.5, abs=1 / 255)
