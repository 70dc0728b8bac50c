"""Samples: noise of their own, the same whatever the batch, process or interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_auraflow, tiny_flux, tiny_images
from torch import Tensor

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.config.model_commands import EvalConfig
from lpl.evaluation.generate import (
    Sampling,
    check_settings,
    generate,
    generate_into,
    generator_of,
    image_name,
    settings_of,
    write_settings,
)
from lpl.evaluation.planning import check_eval
from lpl.families.sampling import FamilySampler, check_sampler, load_for_sampling

SAMPLING = Sampling(16, num_inference_steps=2, guidance_scale=2.0, seed=3, batch_size=4)
PROMPTS = ("a cat", "a cup", "a rocket")
CPU = torch.device("cpu")
SCHEDULERS: tuple[Any, ...] = ("model", "dpmsolver++")


class Recorder:
    """A sampler of plain noise that notes its batches and may stop."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop_after = stop_after

    def __call__(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator], steps: int, guidance: float, size: int
    ) -> Tensor:
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(list(prompts))
        noise = [torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8) for g in generators]
        return torch.stack(noise)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prompts_repeat_and_noise_is_keyed() -> None:
    draw = Recorder()
    images = generate(draw, PROMPTS, 10, SAMPLING)
    assert images.shape == (10, 3, 16, 16)
    assert [p for batch in draw.batches for p in batch] == [PROMPTS[i % 3] for i in range(10)]
    assert [len(batch) for batch in draw.batches] == [4, 4, 2]
    expected = torch.randint(0, 256, (3, 16, 16), generator=generator_of(3, 7), dtype=torch.uint8)
    assert torch.equal(images[7], expected)
    assert torch.equal(generate(Recorder(), PROMPTS, 5, Sampling(16, seed=3, batch_size=2)), images[:5])
    assert not torch.equal(generate(Recorder(), PROMPTS, 5, Sampling(16, seed=4)), images[:5])


def test_interrupted_and_shared_runs_end_with_the_same_files(tmp_path: Path) -> None:
    assert generate_into(Recorder(), PROMPTS, tmp_path / "whole", 11, SAMPLING) == 11
    whole = contents(tmp_path / "whole")
    assert list(whole) == [image_name(i) for i in range(11)]
    with pytest.raises(KeyboardInterrupt):
        generate_into(Recorder(stop_after=1), PROMPTS, tmp_path / "torn", 11, SAMPLING)
    assert len(contents(tmp_path / "torn")) == 4
    (tmp_path / "torn" / image_name(2)).unlink()
    draw = Recorder()
    assert generate_into(draw, PROMPTS, tmp_path / "torn", 11, SAMPLING) == 8
    assert len(draw.batches) == 3
    assert contents(tmp_path / "torn") == whole
    assert generate_into(Recorder(stop_after=0), PROMPTS, tmp_path / "torn", 11, SAMPLING) == 0
    counts = [generate_into(Recorder(), PROMPTS, tmp_path / "two", 11, SAMPLING, rank=r, world=2) for r in (1, 0)]
    assert counts == [4, 7]
    assert contents(tmp_path / "two") == whole
    generate_into(Recorder(), PROMPTS, tmp_path / "two", 13, SAMPLING)  # more of them later
    assert {k: v for k, v in contents(tmp_path / "two").items() if k in whole} == whole


def test_thousand_images_a_folder() -> None:
    assert [image_name(i) for i in (0, 999, 1000, 123456)] == [
        "00000/00000000.png",
        "00000/00000999.png",
        "00001/00001000.png",
        "00123/00123456.png",
    ]


def test_settings_are_compared(tmp_path: Path) -> None:
    settings = settings_of(SAMPLING, prompts="ab", weights="cd")
    check_settings(tmp_path, settings)
    write_settings(tmp_path, settings)
    check_settings(tmp_path, settings)
    check_settings(tmp_path, settings_of(Sampling(16, 2, 2.0, 3, batch_size=1), prompts="ab"))
    with pytest.raises(UserError, match=r"drawn otherwise \(seed 3 -> 4, weights cd -> ef\); choose another folder$"):
        check_settings(tmp_path, settings_of(Sampling(16, 2, 2.0, 4), prompts="ab", weights="ef"))
    (tmp_path / "samples.json").unlink()
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"no samples\.json"):
        check_settings(tmp_path, settings)


@pytest.fixture(scope="module")
def sampler(model: Path) -> Any:
    return load_for_sampling(ModelConfig(str(model)), torch.float32, CPU)


def test_configurations_tell_what_draws_otherwise(model: Path, sampler: Any, tmp_path: Path) -> None:
    """The same model elsewhere is the same; a setting that acts is not, though no weight differs."""
    own = sampler.configuration(PROMPTS)
    assert set(own) >= {"pipeline", "scheduler", "unet", "vae", "tokenizer", "text_encoder"}
    other = shutil.copytree(model, tmp_path / "other")

    def differing(prompts: Sequence[str] = PROMPTS) -> set[str]:
        found = load_for_sampling(ModelConfig(str(other)), torch.float32, CPU).configuration(prompts)
        assert found.keys() == own.keys()
        return {name for name in own if found[name] != own[name]}

    def change(file: str, **values: Any) -> None:
        config = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps(config | values))

    change("unet/config.json", _diffusers_version="0.1", _name_or_path="elsewhere")
    change("text_encoder/config.json", transformers_version="4.0", architectures=["Other"])
    assert differing() == set()
    assert differing(["another"]) == {"tokenizer", "tokenizer_2"}
    change("scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert differing() == {"scheduler"}
    change("vae/config.json", scaling_factor=0.6)
    change("model_index.json", force_zeros_for_empty_prompt=False)
    assert differing() == {"scheduler", "vae", "pipeline"}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_the_pipelines_own(model: Path, sampler: Any, guidance: float) -> None:
    from diffusers import StableDiffusionXLPipeline

    images = generate(sampler, PROMPTS, 3, Sampling(16, 3, guidance, seed=1))
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt,
            num_inference_steps=3,
            guidance_scale=guidance,
            height=16,
            width=16,
            generator=generator_of(1, i),
            output_type="pt",
        ).images[0]
        assert (images[i] / 255 - expected).abs().max() < 0.51 / 255 + 1e-5
    assert (images[0].float() - images[1].float()).abs().max() > 2


def test_batches_change_rounding_at_most(sampler: Any) -> None:
    sets = [generate(sampler, PROMPTS, 6, Sampling(16, 2, 2.0, 0, batch_size=b)).int() for b in (1, 4, 6)]
    for other in sets[1:]:
        assert (other - sets[0]).abs().max() <= 1


def test_trailing_timesteps_begin_with_pure_noise_and_leading_ones_do_not(model: Path) -> None:
    def sampler(spacing: Any) -> Any:
        return load_for_sampling(ModelConfig(str(model)), torch.float32, CPU, spacing=spacing)

    first = {}
    for spacing in ("leading", "trailing"):
        scheduler = sampler(spacing).pipeline.scheduler
        assert scheduler.config.timestep_spacing == spacing
        scheduler.set_timesteps(4)
        first[spacing] = int(scheduler.timesteps[0])
    assert first["trailing"] == 999
    assert first["leading"] < 800
    drawn = [generate(sampler(spacing), PROMPTS, 1, Sampling(16, 2, 1.0)) for spacing in ("leading", "trailing")]
    assert not torch.equal(*drawn)


def test_a_sampler_of_discrete_timesteps_is_refused_for_flow_matching(tmp_path: Path) -> None:
    config = ModelConfig(str(tiny_flux(tmp_path / "flux")))
    check_sampler(config, "model", "model")
    with pytest.raises(UserError, match=r"--scheduler dpmsolver\+\+: it was trained by flow matching"):
        check_sampler(config, "dpmsolver++", "model")
    with pytest.raises(UserError, match="--timestep_spacing trailing: it was trained by flow matching"):
        check_sampler(config, "model", "trailing")


def test_larger_samples_than_a_model_knows_are_refused_before_it_loads(tmp_path: Path) -> None:
    folder, images = str(tiny_auraflow(tmp_path / "auraflow")), tiny_images(tmp_path / "images", count=10)
    options = EvalConfig(folder, reference_dir=images, metrics=("spectrum",), output_dir=str(tmp_path / "out"))
    assert check_eval(replace(options, resolution=64)).resolution == 64
    with pytest.raises(UserError, match="--resolution 72: the model knows no more than 64 pixels a side"):
        check_eval(replace(options, resolution=72))


def test_another_scheduler_solves_the_same_equation(model: Path) -> None:
    """With many steps the solvers meet; with few they differ."""
    own, other = (
        load_for_sampling(ModelConfig(str(model)), torch.float32, CPU, scheduler=s) for s in ("model", "dpmsolver++")
    )
    assert isinstance(own, FamilySampler)
    assert type(other.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert other.pipeline.scheduler.config.beta_schedule == "scaled_linear"
    few, many = (
        [generate(s, PROMPTS, 6, Sampling(16, steps, 1.0)).float() for s in (own, other)] for steps in (2, 100)
    )
    assert (many[0] - many[1]).abs().mean() < 0.5 * (few[0] - few[1]).abs().mean()


def test_samples_that_are_not_finite_are_refused(model: Path) -> None:
    sampler = load_for_sampling(ModelConfig(str(model)), torch.float32, CPU)
    with torch.no_grad():
        next(sampler.vae.decoder.parameters()).fill_(float("inf"))
    with pytest.raises(UserError, match="samples are not finite"):
        generate(sampler, PROMPTS, 1, SAMPLING)
