"""With LPL off the trainer is the plain loop that anyone would write, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from lpl.config import DataConfig, ModelConfig
from lpl.data.prepare import prepare_data
from lpl.data.sources import open_source
from lpl.diffusion.draws import draw_normal, keyed_generator, keyed_uniform
from lpl.families import load_family

STEPS, BATCH, ACCUMULATION, RATE, SEED = 5, 2, 2, 1e-3, 3
OPTIONS = {
    "seed": SEED,
    "max_train_steps": STEPS,
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "random_flip": True,
    "proportion_empty_prompts": 0.3,
}


def plain_loop(model: Path, data: Path, cache: Path) -> dict[str, Tensor]:
    """AdamW on the mean squared error of the noise; what the trainer caches and how it draws is taken from lpl."""
    config = DataConfig(
        train_data_dir=str(data),
        latent_cache_dir=str(cache),
        resolution=16,
        random_flip=True,
        proportion_empty_prompts=0.3,
    )
    family = load_family(ModelConfig(str(model)), torch.device("cpu"), torch.float32)
    samples = prepare_data(open_source(config, None), None, config, family, SEED, cache / "bad_files.jsonl")
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    unet = pipeline.unet.train()
    cumprod = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.double()
    decayed, kept = ([p for p in unet.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    position = 0
    for _ in range(STEPS):
        for _ in range(ACCUMULATION):
            draws = []
            for _ in range(BATCH):
                epoch, offset = divmod(position, len(samples))
                order = torch.randperm(len(samples), generator=keyed_generator(SEED, "order", epoch))
                draws.append((int(order[offset]), epoch))
                position += 1
            batch = samples.batch(draws)
            keys = list(zip(batch.sample_ids, batch.counts, strict=True))
            t = torch.tensor([int(keyed_uniform(SEED, "timestep", *key) * 1000) for key in keys])
            latents = batch.raw_latents * pipeline.vae.config.scaling_factor
            noise = torch.stack([draw_normal(tuple(latents.shape[1:]), SEED, "noise", *key) for key in keys])
            alpha, sigma = (c.float()[:, None, None, None] for c in (cumprod[t].sqrt(), (1 - cumprod[t]).sqrt()))
            output = unet(
                alpha * latents + sigma * noise,
                t,
                batch.text["prompt_embeds"],
                added_cond_kwargs={"text_embeds": batch.text["pooled"], "time_ids": batch.extra["sizes"]},
            ).sample
            loss = (output - noise).square().flatten(1).mean(1).mean()
            (loss / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in unet.named_parameters()}


@pytest.fixture(scope="module")
def off(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    no_lpl = {"use_lpl": False, "lpl_weight": None, "lpl_norm_type": None, "lpl_t_threshold": None}
    return train_in(tmp_path_factory.mktemp("off") / "out", **OPTIONS, **no_lpl)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_lpl_off_is_the_plain_loop(off: Any, model: Path, data: Path, shared: Path) -> None:
    expected = plain_loop(model, data, shared / "cache")
    assert same(off.unet(), expected)
    start = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True).unet.state_dict()
    assert not same(off.unet(), start)


def test_lpl_that_never_starts_or_weighs_nothing_is_off(off: Any, train: Any) -> None:
    late = train(**OPTIONS, lpl_start=STEPS, output="late")
    assert same(late.unet(), off.unet())
    assert "lpl/loss" not in late.logged()
    nothing = train(**OPTIONS, lpl_weight=0.0, output="nothing")
    assert same(nothing.unet(), off.unet())
    assert "lpl/loss" in nothing.logged()


def test_lpl_acts_from_its_start_on(off: Any, train: Any) -> None:
    """With this seed two of the fourth step's samples pass the gate, none of the fifth's."""
    late = train(**OPTIONS, lpl_start=3)
    assert not same(late.unet(), off.unet())
    logged, without = late.logged(), off.logged()
    assert [logged["train_loss"][step] for step in (1, 2, 3)] == [without["train_loss"][step] for step in (1, 2, 3)]
    assert [logged["diffusion_loss"][step] for step in (1, 2, 3, 4)] == [
        without["diffusion_loss"][step] for step in (1, 2, 3, 4)
    ]
    assert logged["diffusion_loss"][5] != without["diffusion_loss"][5]
    assert list(logged["lpl/loss"]) == [4]
    assert list(logged["lpl/application_ratio"].values()) == [0.5, 0.0]
    assert logged["train_loss"][4] > without["train_loss"][4]


def test_lpl_on_and_off_see_the_same_draws(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpl.training.step import TrainingStep

    seen: list[Any] = []
    original = TrainingStep.draw

    def spy(self: TrainingStep, batch: Any, *where: Any) -> Any:
        drawn = original(self, batch, *where)
        seen.append(
            (batch.sample_ids, batch.counts, batch.raw_latents, batch.extra["sizes"], drawn.noise, drawn.levels)
        )
        return drawn

    monkeypatch.setattr(TrainingStep, "draw", spy)
    train(**OPTIONS, use_lpl=False, output="without")
    without, seen = seen, []
    train(**OPTIONS, output="on")
    assert len(seen) == len(without) == STEPS * ACCUMULATION
    for (ids, counts, *tensors), (ids_2, counts_2, *tensors_2) in zip(seen, without, strict=True):
        assert (ids, counts) == (ids_2, counts_2)
        assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_2, strict=True))
    assert len({tuple(t.tolist()) for *_, t in seen}) > 1


def test_another_seed_is_another_run(off: Any, train: Any) -> None:
    other = train(**OPTIONS | {"seed": SEED + 1}, use_lpl=False, output="other")
    assert not same(other.unet(), off.unet())
    assert other.losses()["diffusion_loss"] != off.losses()["diffusion_loss"]
    again = train(**OPTIONS, use_lpl=False, output="again")
    assert same(again.unet(), off.unet())
    assert again.losses() == off.losses()
