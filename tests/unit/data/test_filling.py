"""Filling the caches: what is encoded, what is reused, what is left out, and what is refused."""

import json
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
from PIL import Image

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data import filling
from lpl.data.crops import plan_crop, render, to_float
from lpl.data.dataset import TrainingData
from lpl.data.decode import decode_image
from lpl.data.filling import Staging, caption_key
from lpl.data.lock import default_cache_dir
from lpl.data.prepare import Mark, Processes, prepare_data
from lpl.data.sources import folder as folder_module
from lpl.data.sources import open_source
from lpl.data.store import TensorStore
from lpl.data.upkeep import verify_cache

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


def test_second_run_opens_and_encodes_nothing(
    encode: Encode, encoder: Any, lines: Callable[[], list[str]], opened: list[str]
) -> None:
    encode()
    assert "5 samples; 5 crops and 5 captions encoded" in lines()[0]
    opened.clear()
    encode(random_flip=True)  # adds the mirrored ones
    assert "5 samples; 5 crops and 0 captions encoded" in lines()[0]
    assert len(opened) == 5
    encode(random_flip=True)
    assert "5 samples; 0 crops and 0 captions encoded" in lines()[0]
    assert len(opened) == 5
    assert (encoder.images, len(encoder.captions)) == (10, 5)


def test_latents_are_those_of_the_planned_crop(encode: Encode, encoder: Any, folder: Path) -> None:
    data = encode(random_flip=True, crop_variants=2, seed=7)
    image = decode_image((folder / "3.png").read_bytes())
    row = data.samples[3]
    for variant in range(2):
        for flip in (False, True):
            crop = plan_crop(64, 48, (32, 32), False, 0, "crop", "3.png", variant, flip=flip)
            found = data.caches.latents.gather([data.views.key(row.digest, crop)])
            mean, std = encoder.encode_images(to_float(render(image, crop, "lanczos")[None]))
            assert torch.equal(found["mean"], mean)
            assert torch.equal(found["std"], std)


def test_crops_of_one_size_are_encoded_together(encode: Encode, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "ENCODE_PIXELS", 4 * 32 * 32)
    encode(random_flip=True)
    assert encoder.batch_sizes == [4, 4, 2]


def test_buckets_are_encoded_apart(encode: Encode, encoder: Any) -> None:
    data = encode(buckets=True, bucket_step=8, dataloader_num_workers=0)
    sizes = [data.views.buckets.sizes[b] for b in data.buckets]
    assert sizes == [(32, 32), (32, 32), (40, 24), (24, 40), (24, 40)]
    assert sorted(encoder.batch_sizes) == sorted(sizes.count(size) for size in set(sizes))
    for index, (height, width) in enumerate(sizes):
        batch = data.batch([(index, 0)])
        assert batch.raw_latents.shape == (1, 4, height // 8, width // 8)
        assert batch.extra["sizes"][0, 4:].tolist() == [height, width]


def test_only_what_is_new_or_changed_is_read(
    encode: Encode, encoder: Any, folder: Path, opened: list[str], picture: Any
) -> None:
    def encoded() -> tuple[int, list[str], list[str]]:
        encoder.images, encoder.captions = 0, []
        opened.clear()
        encode()
        return encoder.images, encoder.captions, opened

    encode()
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes())  # touched
    assert encoded() == (0, [], ["0.png"])
    Image.new("RGB", (40, 32), "red").save(folder / "0.png")
    assert encoded() == (1, [], ["0.png"])
    (folder / "0.txt").write_text("new words")
    assert encoded() == (0, ["new words"], ["0.png"])
    picture(77, 32, 32).save(folder / "+.png")
    (folder / "+.txt").write_text("first")
    assert encoded() == (1, ["first"], ["+.png"])


def test_rehash_reads_everything_again_and_encodes_what_differs(
    encode: Encode, encoder: Any, folder: Path, opened: list[str]
) -> None:
    encode()
    status = (folder / "1.png").stat()
    Image.new("RGB", (32, 32), "blue").save(folder / "1.png", "BMP")
    with open(folder / "1.png", "ab") as file:
        file.truncate(status.st_size)
    os.utime(folder / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    opened.clear()
    encode()
    assert opened == []
    encode(rehash=True)
    assert len(opened) == 5
    assert encoder.images == 6


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
    [
        {"resolution": 24},
        {"image_interpolation_mode": "box"},
        {"center_crop": True},
        {"crop_variants": 3},
        {"buckets": True, "bucket_step": 8},
        {"background_color": "black"},
    ],
)
def test_options_that_change_pixels_encode_anew(encode: Encode, encoder: Any, options: dict[str, Any]) -> None:
    encode()
    encode(**options)
    assert encoder.images > 5
    assert len(encoder.captions) == 5


def test_another_seed_encodes_nothing(encode: Encode, encoder: Any) -> None:
    one = encode(crop_variants=3)
    other = encode(crop_variants=3, seed=1)
    assert encoder.images == 15 - 2  # one image has no room to be cropped differently
    draws = [(4, count) for count in range(8)]
    assert not torch.equal(one.batch(draws).extra["sizes"], other.batch(draws).extra["sizes"])


def test_the_same_image_and_caption_are_encoded_once(encode: Encode, encoder: Any, folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "copy.txt").write_text("caption 1")
    data = encode()
    assert data.samples[1].digest == data.samples[4].digest
    assert (encoder.images, len(encoder.captions)) == (5, 5)


def test_the_empty_caption_is_there_when_captions_are_dropped(encode: Encode, encoder: Any) -> None:
    encode()
    assert "" not in encoder.captions
    data = encode(proportion_empty_prompts=0.1)
    assert encoder.captions[5:] == [""]
    assert caption_key("") in data.caches.text


def test_every_order_of_a_caption_is_cached(encode: Encode, encoder: Any, folder: Path) -> None:
    (folder / "0.txt").write_text("a, b, c")
    data = encode(shuffle_caption=True, caption_variants=3)
    assert len([caption for caption in encoder.captions if sorted(caption) == sorted("a, b, c")]) == 3
    for count in range(6):
        data.batch([(0, count)])


def test_the_index_is_there_before_the_mark(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Mark, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            encode()
    assert len(list((tmp_path / "c").glob("*/*/index.npz"))) == 2
    (left,) = (tmp_path / "c" / "staged").iterdir()
    (left / ".unfinished.tmp").write_bytes(b"what a kill while writing leaves")
    encode()
    assert [path.name for path in left.iterdir()] == ["lock"]


def test_threads_give_the_same(encode: Encode, tmp_path: Path) -> None:
    plain = encode(dataloader_num_workers=0)
    threaded = encode(latent_cache_dir=str(tmp_path / "other"), dataloader_num_workers=3)
    draws = [(n, 0) for n in range(5)]
    assert torch.equal(plain.batch(draws).raw_latents, threaded.batch(draws).raw_latents)
    assert contents(tmp_path / "c") == contents(tmp_path / "other")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, but for the marks that runs leave."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_bad_images_are_left_out_and_listed(
    encode: Encode, folder: Path, tmp_path: Path, lines: Callable[[], list[str]], opened: list[str]
) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:2000])
    (folder / "1.png").write_text("not an image")
    data = encode(max_bad_fraction=0.4)
    assert [data.samples[n].id for n in range(len(data))] == ["0.png", "3.png", "sub/9.png"]
    listed = [json.loads(line) for line in (tmp_path / "bad_files.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["1.png", "2.png"]
    assert all(entry["reason"] and entry["name"].startswith(str(folder)) for entry in listed)
    assert any("2 images cannot be used" in line and "bad_files.jsonl" in line for line in lines())
    opened.clear()
    assert len(encode(max_bad_fraction=0.4)) == 3
    assert opened == []
    assert len((tmp_path / "bad_files.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(encode: Encode, folder: Path, tmp_path: Path, workers: int) -> None:
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 5 images cannot be used.*2\.png.*--max_bad_fraction 0\.2$") as caught:
        encode(dataloader_num_workers=workers, max_bad_fraction=0)
    assert "\n" not in str(caught.value)
    assert "2.png" in (tmp_path / "bad_files.jsonl").read_text()
    with pytest.raises(UserError, match="1 of 5"):
        encode(dataloader_num_workers=workers, max_bad_fraction=0)
    assert len(encode()) == 4
    with pytest.raises(UserError, match="1 of 5"):
        encode(max_bad_fraction=0)  # though everything is cached now


def test_a_mended_image_comes_back(encode: Encode, folder: Path, tmp_path: Path, picture: Any) -> None:
    (folder / "2.png").write_bytes(b"")
    assert len(encode(max_bad_fraction=0.5)) == 4
    picture(2, 32, 50).save(folder / "2.png")
    assert len(encode()) == 5
    assert not (tmp_path / "bad_files.jsonl").exists()


def test_a_file_that_could_not_be_read_is_tried_again(
    encode: Encode, encoder: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    """Its stamp stays the same: that it could not be read is no property of it. Bad content is one."""
    (folder / "1.png").write_text("not an image")
    read_file = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return read_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        for _ in range(2):
            opened.clear()
            assert len(encode(max_bad_fraction=0.4)) == 3
        assert opened == ["2.png"]
        listed = (tmp_path / "bad_files.jsonl").read_text()
        assert "cannot be read (Permission denied)" in listed
        assert len(listed.splitlines()) == 2
    opened.clear()
    assert len(encode(max_bad_fraction=0.4)) == 4
    assert (encoder.images, opened) == (4, ["2.png"])
    assert len(encode(max_bad_fraction=0.4)) == 4
    assert opened == ["2.png"]


def test_another_decoder_looks_at_bad_images_again(
    encode: Encode, folder: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    (folder / "1.png").write_text("not an image")
    encode(max_bad_fraction=0.4)
    monkeypatch.setattr("lpl.data.catalogue.PIL.__version__", "99")
    opened.clear()
    for _ in range(2):
        encode(max_bad_fraction=0.4)
    assert opened == ["1.png"]


def test_what_another_run_has_found_anew_holds_for_all(encode: Encode, encoder: Any, folder: Path) -> None:
    """Two runs share a catalogue, not their marks: of one that rewrites it the other must notice."""
    encode()
    encode(resolution=24)
    content, status = (folder / "0.png").read_bytes(), (folder / "0.png").stat()
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes().ljust(len(content), b"\0")[: len(content)])
    os.utime(folder / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    encode(rehash=True)
    encoder.images = 0
    data = encode(resolution=24)
    data.batch([(index, 0) for index in range(5)])


def reversed_copy(folder: Path, to: Path) -> Path:
    """The same images and captions under names in the opposite order."""
    to.mkdir()
    for number, image in enumerate(sorted(folder.rglob("*.png"), reverse=True)):
        (to / f"{number}.png").write_bytes(image.read_bytes())
        (to / f"{number}.txt").write_text(image.with_suffix(".txt").read_text())
    return to


def assert_same_entries(data: TrainingData, alone: TrainingData) -> None:
    for row in (alone.samples[index] for index in range(len(alone))):
        (crop,) = alone.views.crops(row.id, row.digest, row.width, row.height)
        found, expected = data.caches.latents.gather([crop]), alone.caches.latents.gather([crop])
        assert torch.equal(found["mean"], expected["mean"])


def test_two_orders_of_the_same_images_share_a_cache(
    encode: Encode, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled at the same time, and again after a kill before the index: rows lie in the order of either source."""
    other = str(reversed_copy(folder, tmp_path / "reversed"))
    alone = encode(train_data_dir=other, latent_cache_dir=str(tmp_path / "alone"), center_crop=True)
    together = threading.Barrier(2, timeout=60)
    claim = Staging.commit

    def commit(staging: Staging) -> None:
        together.wait()  # both have looked, and neither has what the other one encodes
        claim(staging)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", commit)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda source: encode(train_data_dir=source, center_crop=True), (str(folder), other)))
    assert len(list((tmp_path / "c" / "latents").rglob("*.safetensors"))) == 2
    for source in (str(folder), other):
        assert_same_entries(encode(train_data_dir=source, center_crop=True), alone)
    for shard in (tmp_path / "c" / "latents").rglob("*.safetensors"):
        shard.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(TensorStore, "save_index", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode(train_data_dir=str(folder), center_crop=True)
    assert_same_entries(encode(train_data_dir=other, center_crop=True), alone)
    verify_cache(str(tmp_path / "c"), delete=False)


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    encode: Encode, encoder: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Any
) -> None:
    """By another run's mark, or without one: what is missing is one line."""
    full = encode(random_flip=True)
    lines()

    def read_only(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if str(path).startswith(str(tmp_path / "c")) and writes(*rest):
                raise OSError(30, "Read-only file system", str(path))
            return function(path, *rest, **options)

        return call

    for name in ("utime", "replace", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, read_only(getattr(os, name), lambda *_: True))
    monkeypatch.setattr("builtins.open", read_only(open, lambda mode="r", *_: "w" in mode))
    monkeypatch.setattr(os, "open", read_only(os.open, lambda flags, *_: bool(flags & (os.O_RDWR | os.O_WRONLY))))
    before = contents(tmp_path / "c")
    encoder.images = 0
    draws = [(index, 0) for index in range(5)]
    assert torch.equal(encode(random_flip=True).batch(draws).raw_latents, full.batch(draws).raw_latents)
    assert len(encode()) == 5
    assert len([line for line in lines() if "lpl cache prune" in line]) == 2
    with pytest.raises(
        UserError, match=r"not all of it is cached, and cache .* cannot be written \(Read-only"
    ) as caught:
        encode(resolution=24)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "c") == before
    assert encoder.images == 0


def test_a_damaged_catalogue_is_refused_by_name(encode: Encode, folder: Path, tmp_path: Path) -> None:
    """Flipped bytes of it would give images other captions, or the latents of others."""
    encode()
    (path,) = (tmp_path / "c" / "catalogues").rglob("*.arrow")
    content = path.read_bytes()
    at = content.index(b"caption 2")
    path.write_bytes(content[:at] + b"caption 3" + content[at + 9 :])
    with pytest.raises(UserError, match=r"does not match its checksum.*lpl cache verify --delete") as caught:
        encode()
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="1 of 5 files are damaged"):
        verify_cache(str(tmp_path / "c"), delete=False)
    verify_cache(str(tmp_path / "c"), delete=True)
    assert encode().samples[2].captions == ["caption 2"]


@pytest.mark.parametrize("note", ["[]", "7", '{"shards": 3}', '{"shards": [[1], [2]], "catalogue": []}', "[" * 10**5])
def test_a_mark_that_is_none_is_made_anew(encode: Encode, encoder: Any, tmp_path: Path, note: str) -> None:
    encode()
    (path,) = (tmp_path / "c" / "catalogues").rglob("complete-*.json")
    whole = path.read_text()
    path.write_text(note)
    encode()
    assert path.read_text() == whole
    assert encoder.images == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", [0, 1])
def test_latents_that_are_not_finite_are_refused_by_name(
    encode: Encode, encoder: Any, monkeypatch: pytest.MonkeyPatch, bad: float, field: int
) -> None:
    sound = encoder.encode_images

    def overflowing(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = sound(pixels)
        if encoder.images == 4:
            result[field][1, 0, 0, 0] = bad
        return result

    monkeypatch.setattr(filling, "ENCODE_PIXELS", 2 * 32 * 32)
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


def test_overflow_of_a_half_precision_cache_names_the_option(encode: Encode, encoder: Any) -> None:
    sound = encoder.encode_images
    encoder.encode_images = lambda pixels: tuple(1e6 * value for value in sound(pixels))
    with pytest.raises(UserError, match=r"0\.png: the VAE makes NaN or Inf of it in --cache_dtype float16"):
        encode(cache_dtype="float16")
    encode(cache_dtype="bfloat16")


def test_upscaled_images_are_counted_once(encode: Encode, lines: Callable[[], list[str]]) -> None:
    encode(resolution=40, random_flip=True, crop_variants=2)
    warned = [line for line in lines() if "--resolution 40" in line]
    assert len(warned) == 1
    assert warned[0].startswith("4 of 5 images")
    encode(resolution=32)
    assert len(lines()) == 1


def test_killed_run_loses_one_batch_at_most(
    encode: Encode, encoder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(filling, "ENCODE_PIXELS", 32 * 32)
    sound = encoder.encode_images

    def killed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if encoder.images == 3:
            raise KeyboardInterrupt
        return sound(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode_images", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(dataloader_num_workers=0)
    encoder.images = 0
    encode(dataloader_num_workers=0)
    assert encoder.images == 2
    encode(latent_cache_dir=str(tmp_path / "undisturbed"))
    assert contents(tmp_path / "c") == contents(tmp_path / "undisturbed")


def test_too_little_room_is_said_before_the_first_image(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    usage = type("Usage", (), {"free": 2000})
    monkeypatch.setattr("lpl.data.prepare.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"GiB are needed and 0\.0 GiB free.*--latent_cache_dir"):
        encode()
    assert opened == []


def test_processes_share_the_work(
    folder: Path, tmp_path: Path, encoder: Any, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "PIECE_SIZE", 2)
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

    def process(rank: int) -> TrainingData:
        time.sleep(0.2 if rank == 0 else 0)  # the others would have written by now, did they not wait
        processes = Processes(rank, 3, lambda: gate.wait() and None)
        source = open_source(config, None)
        return prepare_data(source, None, config, encoders[rank], 0, tmp_path / "bad.jsonl", processes)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(process, range(3)))
    assert [e.images for e in encoders] == [4, 4, 2]
    assert sorted(caption for e in encoders for caption in e.captions if caption) == [
        f"caption {n}" for n in (0, 1, 2, 3, 9)
    ]
    alone = encode(random_flip=True, latent_cache_dir=str(tmp_path / "alone"))
    draws = [(n, c) for n in range(5) for c in range(2)]
    for data in results:
        assert torch.equal(data.batch(draws).raw_latents, alone.batch(draws).raw_latents)
    assert contents(tmp_path / "c") == contents(tmp_path / "alone")


def test_cache_that_others_do_not_share_is_refused(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "PIECE_SIZE", 2)
    with pytest.raises(UserError, match=r"lacks entries that other processes have encoded: .*--latent_cache_dir"):
        encode(index=0, processes=2)


def test_damaged_shard_stops_the_run(encode: Encode, tmp_path: Path, encoder: Any) -> None:
    data = encode()
    shard = tmp_path / "c" / "latents" / f"{'a' * 32}-3" / data.caches.latents.shards[0]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match="lpl cache verify --delete"):
        encode(rehash=True).batch([(0, 0)])
    shard.unlink()
    encoder.images = 0
    encode().batch([(0, 0)])
    assert encoder.images == 5


def test_another_users_cache_is_used_and_said(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    encode()
    lines()

    def refused(path: Path, *_: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("lpl.data.prepare.os.utime", refused)
    assert len(encode()) == 5
    assert len([line for line in lines() if "is another user's" in line and "lpl cache prune" in line]) == 1


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/lpl")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path.home() / ".cache" / "lpl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "lpl"


def test_another_instance_prompt_encodes_captions_and_no_image(
    encode: Encode, encoder: Any, folder: Path, opened: list[str], lines: Callable[[], list[str]]
) -> None:
    (folder / "1.txt").unlink()
    (folder / "3.txt").unlink()
    first = encode(instance_prompt="sks")
    assert [first.samples[n].captions for n in (0, 1, 3)] == [["caption 0"], ["sks"], ["sks"]]
    assert any("--instance_prompt is the caption of 2 of 5 images" in line for line in lines())
    encoder.captions.clear()
    opened.clear()
    assert encode(instance_prompt="a sks").samples[1].captions == ["a sks"]
    assert encoder.captions == ["a sks"]
