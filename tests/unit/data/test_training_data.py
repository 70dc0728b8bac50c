"""Draws out of the caches: functions of sample and count alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpl.data.crops import Crop
from lpl.data.dataset import TrainingData
from lpl.data.filling import caption_key
from lpl.diffusion.draws import draw_normal

Encode = Callable[..., TrainingData]


def test_a_batch_holds_what_a_step_needs(encode: Encode) -> None:
    data = encode()
    batch = data.batch([(4, 0), (1, 2)])
    assert len(data) == 5
    assert batch.sample_ids == ["sub/9.png", "1.png"]
    assert batch.counts == [0, 2]
    assert (batch.raw_latents.shape, batch.raw_latents.dtype) == ((2, 4, 4, 4), torch.float32)
    assert batch.text["prompt_embeds"].shape == (2, 8, 4)
    assert batch.text["pooled"].shape == (2, 5)
    assert (batch.extra["sizes"].shape, batch.extra["sizes"].dtype) == ((2, 6), torch.float32)
    assert batch.extra["sizes"][1].tolist() == [32, 32, 0, 0, 32, 32]
    assert torch.equal(batch.text["pooled"][1], data.caches.text.gather([caption_key("caption 1")])["pooled"][0])


def test_captions_of_several_lengths_are_padded_with_zeros(encode: Encode, encoder: Any, monkeypatch: Any) -> None:
    """Each is cached in its own length; what is padded in a batch tells by a field of ones."""
    lengths = {"caption 1": 2, "caption 9": 5}

    def encode_text(captions: list[str]) -> dict[str, Any]:
        rows = [torch.full((lengths.get(caption, 3), 4), float(len(caption))) for caption in captions]
        return {"embeds": rows, "mask": [torch.ones(len(row)) for row in rows]}

    monkeypatch.setattr(encoder, "encode_text", encode_text)
    data = encode()
    assert data.caches.text.gather([caption_key("caption 1")])["embeds"].shape == (1, 2, 4)
    text = data.batch([(4, 0), (1, 0), (0, 0)]).text
    assert text["embeds"].shape == (3, 5, 4)
    for row, mask, caption in zip(text["embeds"], text["mask"], ("caption 9", "caption 1", "caption 0"), strict=True):
        length = lengths.get(caption, 3)
        assert mask.tolist() == [1.0] * length + [0.0] * (5 - length)
        assert row[:, 0].tolist() == [9.0] * length + [0.0] * (5 - length)


def test_draws_do_not_depend_on_batch_or_order(encode: Encode) -> None:
    data = encode(random_flip=True, crop_variants=3, proportion_empty_prompts=0.5)
    draws = [(index, count) for index in range(5) for count in range(4)]
    together = data.batch(draws)
    for n in reversed(range(len(draws))):
        alone = data.batch([draws[n]])
        assert torch.equal(alone.raw_latents[0], together.raw_latents[n])
        assert torch.equal(alone.extra["sizes"][0], together.extra["sizes"][n])
        assert torch.equal(alone.text["pooled"][0], together.text["pooled"][n])
    again = encode(random_flip=True, crop_variants=3, proportion_empty_prompts=0.5).batch(draws)
    assert torch.equal(again.raw_latents, together.raw_latents)


def posterior(data: TrainingData, crop: Crop, index: int) -> dict[str, Tensor]:
    key = data.views.key(data.samples[index].digest, crop)
    return {name: value[0] for name, value in data.caches.latents.gather([key]).items()}


def drawn_crop(data: TrainingData, index: int, count: int) -> Crop:
    row = data.samples[index]
    return data.views.draw(data.seed, row.id, row.width, row.height, count)


def test_latents_are_fresh_posterior_samples(encode: Encode) -> None:
    data = encode(seed=3)
    own = posterior(data, drawn_crop(data, 2, 0), 2)
    for count in range(3):
        noise = draw_normal((4, 4, 4), 3, "posterior", "2.png", count)
        assert torch.equal(data.batch([(2, count)]).raw_latents[0], own["mean"] + own["std"] * noise)
    means = torch.stack([data.batch([(2, count)]).raw_latents[0] for count in range(400)])
    assert (means.mean(0) - own["mean"]).abs().max() < 0.03
    assert (means.std(0) / own["std"] - 1).abs().max() < 0.2


def test_flips_and_variants_are_drawn_anew_each_time(encode: Encode) -> None:
    data = encode(random_flip=True, crop_variants=3)
    drawn = [drawn_crop(data, 4, count) for count in range(300)]
    assert len(set(drawn)) == 6
    assert all(30 <= drawn.count(crop) <= 75 for crop in set(drawn))


def test_conditioning_belongs_to_the_latent_that_was_drawn(encode: Encode) -> None:
    data = encode(random_flip=True, crop_variants=2)
    row = data.samples[3]
    crops = list(data.views.crops(row.id, row.digest, row.width, row.height).values())
    assert len({crop.size_conditioning for crop in crops}) == 4
    for count in range(20):
        batch = data.batch([(3, count)])
        noise = draw_normal((4, 4, 4), 0, "posterior", "3.png", count)
        found = [(crop, posterior(data, crop, 3)) for crop in crops]
        (crop,) = (c for c, p in found if torch.equal(batch.raw_latents[0], p["mean"] + p["std"] * noise))
        assert batch.extra["sizes"][0].tolist() == list(crop.size_conditioning)


def is_dropped(data: TrainingData, index: int, count: int) -> bool:
    row = data.samples[index]
    text = data.rules.draw(row.id, row.captions, count)
    own = data.caches.text.gather([caption_key(text)])
    assert torch.equal(data.batch([(index, count)]).text["pooled"], own["pooled"])
    return text == ""


def test_captions_are_dropped_anew_each_time(encode: Encode) -> None:
    data = encode(proportion_empty_prompts=0.3)
    dropped = [[is_dropped(data, index, count) for count in range(400)] for index in range(2)]
    assert all(0.2 < sum(row) / 400 < 0.4 for row in dropped)
    assert dropped[0] != dropped[1]


def test_regularisation_images_have_their_weight(encode: Encode, tmp_path: Path, picture: Any) -> None:
    assert encode().batch([(0, 0)]).weights is None
    (tmp_path / "reg").mkdir()
    picture(50, 32, 32).save(tmp_path / "reg" / "0.png")
    (tmp_path / "reg" / "0.txt").write_text("a thing")
    data = encode(reg_data_dir=str(tmp_path / "reg"), prior_loss_weight=0.25)
    assert len(data) == 6
    batch = data.batch([(5, 0), (0, 0)])
    assert batch.sample_ids == ["reg/0.png", "0.png"]
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.25, 1.0]


def test_every_crop_and_text_of_regularisation_images_is_cached(encode: Encode, folder: Path) -> None:
    for n in range(4):
        (folder / f"{n}.txt").write_text("a, b, c, d")
    options = {"crop_variants": 3, "random_flip": True, "shuffle_caption": True, "caption_variants": 5}
    data = encode(reg_data_dir=str(folder), **options)
    assert len(data) == 10
    batch = data.batch([(index, count) for index in range(10) for count in range(40)])
    assert len(batch.extra["sizes"][5 * 40 :].unique(dim=0)) > 5
    encode(train_data_dir=str(folder), **options)  # the other role of the same folder
    again = encode(reg_data_dir=str(folder), **options).batch([(9, 3)])
    assert torch.equal(again.raw_latents[0], batch.raw_latents[9 * 40 + 3])


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision_takes_half_the_space(encode: Encode, tmp_path: Path, dtype: str, error: float) -> None:
    whole, half = encode(), encode(cache_dtype=dtype)
    draws = [(index, 3) for index in range(5)]
    a, b = whole.batch(draws), half.batch(draws)
    assert b.raw_latents.dtype == b.text["pooled"].dtype == torch.float32
    assert 0 < (a.raw_latents - b.raw_latents).abs().max() < error * 2
    assert 0 < (a.text["pooled"] - b.text["pooled"]).abs().max() < error
    (key, _), *_ = half.views.crops("0.png", half.samples[0].digest, 40, 32).items()
    assert 2 * half.caches.latents.entry_bytes(key) == whole.caches.latents.entry_bytes(key)
    assert encode().caches.latents.folder != half.caches.latents.folder


def test_repeats_are_by_folder(encode: Encode) -> None:
    assert encode(repeats="sub=3").repeats.tolist() == [1, 1, 1, 1, 3]


def test_the_digest_is_of_what_is_trained_on(encode: Encode, folder: Path, picture: Any) -> None:
    first = encode().samples.digest()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes())  # touched
    assert encode(resolution=24).samples.digest() == first
    (folder / "1.txt").write_text("other words")
    second = encode().samples.digest()
    picture(99, 32, 32).save(folder / "1.png")
    assert len({first, second, encode().samples.digest()}) == 3


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 50)])
def test_captions_are_kept_or_dropped_always_at_the_ends(encode: Encode, share: float, expected: int) -> None:
    data = encode(proportion_empty_prompts=share)
    assert sum(is_dropped(data, 0, count) for count in range(50)) == expected


def test_seed_changes_what_is_drawn(encode: Encode) -> None:
    one, other = encode(center_crop=True, seed=0), encode(center_crop=True, seed=1)
    assert drawn_crop(one, 4, 0) == drawn_crop(other, 4, 0)
    assert not torch.equal(one.batch([(0, 0)]).raw_latents, other.batch([(0, 0)]).raw_latents)
