"""Draws out of the caches: functions of sample and count alone."""

from collections.abc import Callable

import pytest
import torch

from lpl.data.dataset import TrainingData, caption_key
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
    assert (batch.sizes.shape, batch.sizes.dtype) == ((2, 6), torch.float32)
    assert batch.sizes[1].tolist() == [32, 32, 0, 0, 32, 32]
    assert torch.equal(batch.text["pooled"][1], data.text.get(caption_key("caption 1"))["pooled"])


def test_draws_do_not_depend_on_batch_or_order(encode: Encode) -> None:
    data = encode(random_flip=True, crop_variants=3, proportion_empty_prompts=0.5)
    draws = [(index, count) for index in range(5) for count in range(4)]
    together = data.batch(draws)
    for n in reversed(range(len(draws))):
        alone = data.batch([draws[n]])
        assert torch.equal(alone.raw_latents[0], together.raw_latents[n])
        assert torch.equal(alone.sizes[0], together.sizes[n])
        assert torch.equal(alone.text["pooled"][0], together.text["pooled"][n])
    again = encode(random_flip=True, crop_variants=3, proportion_empty_prompts=0.5).batch(draws)
    assert torch.equal(again.raw_latents, together.raw_latents)


def test_latents_are_fresh_posterior_samples(encode: Encode) -> None:
    data = encode(seed=3)
    posterior = data.latents.get(data.views[2][0][0].latent_key)
    for count in range(3):
        noise = draw_normal((4, 4, 4), 3, "posterior", "2.png", count)
        assert torch.equal(data.batch([(2, count)]).raw_latents[0], posterior["mean"] + posterior["std"] * noise)
    means = torch.stack([data.batch([(2, count)]).raw_latents[0] for count in range(400)])
    assert (means.mean(0) - posterior["mean"]).abs().max() < 0.03
    assert (means.std(0) / posterior["std"] - 1).abs().max() < 0.2


def test_flips_and_variants_are_drawn_anew_each_time(encode: Encode) -> None:
    data = encode(random_flip=True, crop_variants=3)
    drawn = [data.view(4, count) for count in range(300)]
    views = [view for variant in data.views[4] for view in variant]
    assert len(set(views)) == 6
    assert all(30 <= drawn.count(view) <= 75 for view in views)


def test_conditioning_belongs_to_the_latent_that_was_drawn(encode: Encode) -> None:
    data = encode(random_flip=True, crop_variants=2)
    sizes = {view.latent_key: list(view.size_conditioning) for variant in data.views[3] for view in variant}
    assert len({tuple(size) for size in sizes.values()}) == 4
    for count in range(20):
        batch = data.batch([(3, count)])
        noise = draw_normal((4, 4, 4), 0, "posterior", "3.png", count)
        posteriors = {key: data.latents.get(key) for key in sizes}
        (key,) = (k for k, p in posteriors.items() if torch.equal(batch.raw_latents[0], p["mean"] + p["std"] * noise))
        assert batch.sizes[0].tolist() == sizes[key]


def test_captions_are_dropped_anew_each_time(encode: Encode) -> None:
    data = encode(proportion_empty_prompts=0.3)
    dropped = [[data.caption(index, count) == "" for count in range(400)] for index in range(5)]
    assert all(0.2 < sum(row) / 400 < 0.4 for row in dropped)
    assert dropped[0] != dropped[1]
    count = dropped[0].index(True)
    batch = data.batch([(0, count)])
    assert torch.equal(batch.text["pooled"][0], data.text.get(caption_key(""))["pooled"])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 50)])
def test_captions_are_kept_or_dropped_always_at_the_ends(encode: Encode, share: float, expected: int) -> None:
    data = encode(proportion_empty_prompts=share)
    assert sum(data.caption(0, count) == "" for count in range(50)) == expected


def test_seed_changes_what_is_drawn(encode: Encode) -> None:
    one, other = encode(center_crop=True, seed=0), encode(center_crop=True, seed=1)
    assert one.views == other.views
    assert not torch.equal(one.batch([(0, 0)]).raw_latents, other.batch([(0, 0)]).raw_latents)
