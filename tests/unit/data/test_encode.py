"""Filling the caches: what is encoded, what is reused, and what is refused."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lpl.config import DataConfig
from lpl.data import encode as encode_module
from lpl.data.cache import TensorCache
from lpl.data.dataset import TrainingData
from lpl.data.encode import encode_dataset
from lpl.data.sources import open_source
from lpl.data.transforms import decode_image, plan_crop, render
from lpl.errors import UserError

Encode = Callable[..., TrainingData]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Takes the messages logged since the last call."""
    caplog.set_level(logging.INFO, logger="lpl")

    def take() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return take


def test_second_run_encodes_nothing(
    encode: Encode, encoder: Any, lines: Callable[[], list[str]], tmp_path: Path
) -> None:
    encode(random_flip=True)
    where = f"in {tmp_path / 'c'}"
    assert lines() == [f"cache: 10 encoded, 0 reused (latents); 5 encoded, 0 reused (captions) {where}"]
    assert (encoder.images, len(encoder.captions)) == (10, 5)
    encode(random_flip=True, batch_size=3)
    assert lines() == [f"cache: 0 encoded, 10 reused (latents); 0 encoded, 5 reused (captions) {where}"]
    assert (encoder.images, len(encoder.captions)) == (10, 5)


def test_latents_are_those_of_the_planned_crop(encode: Encode, encoder: Any, folder: Path) -> None:
    data = encode(random_flip=True, crop_variants=2, seed=7)
    image = decode_image((folder / "3.png").read_bytes(), "3.png")
    for variant in range(2):
        for flip in (False, True):
            crop = plan_crop(64, 48, 32, False, 7, "crop", "3.png", variant, flip=flip)
            view = data.views[3][variant][flip]
            assert view.size_conditioning == crop.size_conditioning
            mean, std = encoder.encode_images(render(image, crop, "lanczos")[None])
            assert torch.equal(data.latents.get(view.latent_key)["mean"], mean[0])
            assert torch.equal(data.latents.get(view.latent_key)["std"], std[0])


def test_batches_have_the_asked_size(encode: Encode, encoder: Any) -> None:
    encode(random_flip=True, batch_size=4)
    assert encoder.batch_sizes == [4, 4, 2]


def test_changing_one_image_encodes_one_image(encode: Encode, encoder: Any, folder: Path) -> None:
    encode()
    Image.new("RGB", (40, 32), "red").save(folder / "0.png")
    encode()
    assert (encoder.images, len(encoder.captions)) == (6, 5)


def test_changing_one_caption_encodes_one_caption(encode: Encode, encoder: Any, folder: Path) -> None:
    encode()
    (folder / "0.txt").write_text("new words")
    encode()
    assert encoder.images == 5
    assert encoder.captions[5:] == ["new words"]


def test_other_encoders_encode_everything(encode: Encode, encoder: Any) -> None:
    encode()
    encoder.latent_key = "another"
    encode()
    assert (encoder.images, len(encoder.captions)) == (10, 5)
    encoder.text_key = "another"
    encode()
    assert (encoder.images, len(encoder.captions)) == (10, 10)


@pytest.mark.parametrize(
    "options",
    [{"resolution": 24}, {"image_interpolation_mode": "box"}, {"center_crop": True}, {"seed": 1}, {"crop_variants": 3}],
)
def test_options_that_change_pixels_encode_anew(encode: Encode, encoder: Any, options: dict[str, Any]) -> None:
    encode()
    encode(**options)
    assert encoder.images > 5
    assert len(encoder.captions) == 5


def test_flips_add_to_what_is_there(encode: Encode, encoder: Any) -> None:
    encode()
    encode(random_flip=True)
    assert encoder.images == 10


def test_the_same_image_and_caption_are_encoded_once(encode: Encode, encoder: Any, folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "copy.txt").write_text("caption 1")
    data = encode()
    assert data.views[1] == data.views[4]
    assert (encoder.images, len(encoder.captions)) == (5, 5)


def test_the_empty_caption_is_there_when_captions_are_dropped(encode: Encode, encoder: Any) -> None:
    encode()
    assert "" not in encoder.captions
    encode(proportion_empty_prompts=0.1)
    assert encoder.captions[5:] == [""]


def test_workers_give_the_same(encode: Encode, tmp_path: Path) -> None:
    plain = encode()
    forked = encode(latent_cache_dir=str(tmp_path / "other"), dataloader_num_workers=2)
    draws = [(n, 0) for n in range(5)]
    assert torch.equal(plain.batch(draws).raw_latents, forked.batch(draws).raw_latents)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_cut_short_is_named_in_one_line(encode: Encode, folder: Path, workers: int) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"2\.png: cannot be decoded") as caught:
        encode(dataloader_num_workers=workers)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_image_is_named(encode: Encode, encoder: Any, folder: Path) -> None:
    (folder / "2.png").write_text("not an image")
    with pytest.raises(UserError, match=r"2\.png: cannot be decoded"):
        encode()
    assert encoder.images == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", [0, 1])
def test_latents_that_are_not_finite_are_refused_by_name(
    encode: Encode, encoder: Any, monkeypatch: pytest.MonkeyPatch, bad: float, field: int, tmp_path: Path
) -> None:
    sound = encoder.encode_images

    def overflowing(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = sound(pixels)
        if encoder.images == 4:
            result[field][1, 0, 0, 0] = bad
        return result

    monkeypatch.setattr(encoder, "encode_images", overflowing)
    with pytest.raises(UserError, match=r"3\.png: the VAE makes NaN or Inf") as caught:
        encode()
    assert "\n" not in str(caught.value)


def test_text_that_is_not_finite_is_refused_by_name(
    encode: Encode, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "encode_text", lambda captions: {"e": torch.full((len(captions), 2), torch.nan)})
    with pytest.raises(UserError, match="caption 'caption 0': the text encoder makes NaN"):
        encode()


def test_upscaled_images_are_counted_once(encode: Encode, lines: Callable[[], list[str]]) -> None:
    encode(resolution=40, random_flip=True, crop_variants=2)
    warned = [line for line in lines() if "--resolution 40" in line]
    assert len(warned) == 1
    assert warned[0].startswith("4 of 5 images")
    encode(resolution=32)
    assert len(lines()) == 1


def test_killed_run_loses_one_shard_at_most(encode: Encode, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "SHARD_ENTRIES", 2)
    sound = encoder.encode_images

    def killed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if encoder.images == 3:
            raise KeyboardInterrupt
        return sound(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode_images", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(batch_size=1)
    encoder.images = 0
    encode(batch_size=1)
    assert encoder.images == 3


def test_processes_share_the_work(
    folder: Path, tmp_path: Path, encoder: Any, lines: Callable[[], list[str]], encode: Encode
) -> None:
    config = DataConfig(
        train_data_dir=str(folder), resolution=32, random_flip=True, latent_cache_dir=str(tmp_path / "c")
    )
    encoders = [type(encoder)() for _ in range(3)]
    sound = encoders[2].encode_images

    def slow(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.1)
        return sound(pixels)

    encoders[2].encode_images = slow
    gate = threading.Barrier(3, timeout=60)
    results: dict[int, TrainingData] = {}

    def wait() -> None:
        gate.wait()

    def process(rank: int) -> None:
        time.sleep(0.2 if rank == 0 else 0)  # the others would have written by now, did they not wait
        source = open_source(config, None)
        results[rank] = encode_dataset(source, config, encoders[rank], 0, 2, rank, 3, wait, False)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.images for e in encoders) == [2, 4, 4]
    assert sorted(caption for e in encoders for caption in e.captions) == [f"caption {n}" for n in (0, 1, 2, 3, 9)]
    where = f"in {tmp_path / 'c'}"
    assert lines() == [f"cache: 10 encoded, 0 reused (latents); 5 encoded, 0 reused (captions) {where}"]
    alone = encode(random_flip=True, latent_cache_dir=str(tmp_path / "alone"))
    draws = [(n, c) for n in range(5) for c in range(2)]
    for data in results.values():
        assert torch.equal(data.batch(draws).raw_latents, alone.batch(draws).raw_latents)


def test_cache_that_others_do_not_share_is_refused(encode: Encode) -> None:
    with pytest.raises(UserError, match=r"lacks 2 of 5 entries .*--latent_cache_dir"):
        encode(index=0, processes=2)


def test_damaged_shard_stops_the_run(encode: Encode, tmp_path: Path) -> None:
    encode()
    (shard,) = (tmp_path / "c" / "latents" / "aa").iterdir()
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match="delete it"):
        encode()
    shard.unlink()
    encode()
    assert len(TensorCache(tmp_path / "c" / "latents" / "aa")) == 5
