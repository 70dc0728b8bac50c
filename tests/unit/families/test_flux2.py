"""Flux.2 klein beyond the contract: captions as the pipeline encodes them, the distilled model, layers of a LoRA."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from tiny_models import tiny_flux2

from lpl.config import ModelConfig
from lpl.families import load_family
from lpl.families.flux2 import LORA_TARGETS
from lpl.families.sampling import check_guidance
from lpl.training.engine import add_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_flux2(tmp_path_factory.mktemp("distilled") / "model", distilled=True))


@pytest.fixture(scope="module")
def family(distilled: Path) -> Any:
    return load_family(ModelConfig(str(distilled)), CPU, torch.float32)


def test_captions_are_what_the_pipeline_encodes(family: Any, caplog: pytest.LogCaptureFixture) -> None:
    captions = ["", "a hare in a field " * 40]
    found = family.encode_text(list(captions))["prompt_embeds"]
    theirs, _ = family.pipeline.encode_prompt(list(captions))
    assert found.shape == theirs.shape == (2, 512, 24)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    with caplog.at_level(logging.WARNING):
        family.free_encoders()
    assert [record.getMessage()[:35] for record in caplog.records] == ["1 captions were cut to 512 tokens, "]


def test_a_distilled_model_is_drawn_in_few_steps_without_guidance_and_stays_one(
    family: Any, distilled: Path, tmp_path: Path
) -> None:
    base = ModelConfig(str(tiny_flux2(tmp_path / "base")))
    assert (check_guidance(ModelConfig(str(distilled)), None), check_guidance(base, None)) == (None, 4.0)
    assert (family.steps, family.guidance) == (4, 1.0)
    calls: list[Any] = []
    handle = family.denoiser.register_forward_hook(lambda *given: calls.append(given))
    family.prepare_prompt("a fox", "")
    family.sample(family.denoiser, "a fox", "", seed=0, resolution=16)
    handle.remove()
    assert len(calls) == 4
    family.export(family.denoiser, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["is_distilled"] is True


def test_latents_are_standardised_by_channel_and_phase_as_the_pipeline_does_it(family: Any, distilled: Path) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(distilled)
    pixels = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = Flux2KleinPipeline._unpatchify_latents(pipeline._encode_vae_image(pixels, torch.Generator()))
    mean, _ = family.encode_images(pixels)
    torch.testing.assert_close(family.latent_space.from_raw(mean), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", LORA_TARGETS)
def test_a_lora_is_on_what_it_names_in_every_block(distilled: Path, which: Any) -> None:
    config = ModelConfig(str(distilled), rank=2, lora_targets=which)
    own: Any = load_family(config, CPU, torch.float32)
    linear = {name for name, module in own.denoiser.named_modules() if type(module) is torch.nn.Linear}
    add_lora(own.denoiser, config, LORA_TARGETS, 0)
    found = {name for name, module in own.denoiser.named_modules() if hasattr(module, "lora_A")}
    # 8 projections of the joint block and 2 of each of two others; 4 of MLPs; 3 that modulate all blocks.
    assert len(found) == {"attention": 12, "attention_mlp": 16, "all": 19}[which]
    left = {name for name in linear - found if "transformer_blocks" in name or "modulation" in name}
    assert (not left) == (which == "all")
