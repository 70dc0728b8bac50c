"""Flux.1: the distilled variant without guidance, what guidance means, layers of a LoRA, sizes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny_models import tiny_flux

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import load_family
from lpl.families.flux import LORA_TARGETS
from lpl.families.sampling import check_guidance, load_for_sampling
from lpl.training.engine import add_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_flux(tmp_path_factory.mktemp("schnell") / "model", guidance=False))


def test_schnell_reads_its_own_length_of_text_and_no_guidance(schnell: Path) -> None:
    family: Any = load_family(ModelConfig(str(schnell)), CPU, torch.float32)
    pipeline = FluxPipeline.from_pretrained(schnell)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {}
    pipeline.transformer.register_forward_hook(lambda _, __, options, out: given.update(options), with_kwargs=True)
    options: dict[str, Any] = {"height": 24, "width": 16, "num_inference_steps": 1, "max_sequence_length": 256}
    pipeline("a fox", output_type="latent", **options)
    seen: dict[str, Any] = {}
    family.denoiser.register_forward_hook(lambda _, __, options, out: seen.update(options), with_kwargs=True)
    with torch.no_grad():
        family.denoise(family.denoiser, torch.zeros(1, 4, 6, 4), torch.ones(1), family.encode_text(["a fox"]), {})
    assert seen["guidance"] is given["guidance"] is None
    for name in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"):
        assert torch.equal(seen[name], given[name]), name
    assert family.steps == 4
    drawn = load_for_sampling(ModelConfig(str(schnell)), torch.float32, CPU)
    drawn.pipeline.transformer.register_forward_hook(lambda _, __, given, out: seen.update(given), with_kwargs=True)
    drawn(["a fox"], [torch.Generator().manual_seed(0)], 1, None, 16)
    assert seen["encoder_hidden_states"].shape[1] == 256


def test_a_transformer_that_an_engine_has_wrapped_is_the_same(tmp_path: Path) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **given: Any) -> Any:
            return self.module(**given)

    family: Any = load_family(ModelConfig(str(tiny_flux(tmp_path / "dev"))), CPU, torch.float32)
    text, latents = family.encode_text(["a fox"]), torch.ones(1, 4, 4, 4)
    with torch.no_grad():
        plain, wrapped = (
            family.denoise(denoiser, latents, torch.ones(1), text, {})
            for denoiser in (family.denoiser, Wrapped(family.denoiser))
        )
    assert torch.equal(plain, wrapped)


def test_guidance_is_taken_by_the_model_that_has_learned_it_alone(schnell: Path, tmp_path: Path) -> None:
    dev = ModelConfig(str(tiny_flux(tmp_path / "dev")))
    assert [check_guidance(dev, scale) for scale in (None, 1.0)] == [3.5, 1.0]
    assert check_guidance(ModelConfig(str(schnell)), None) is None
    with pytest.raises(UserError, match=r"^--guidance_scale 2.0: the model takes no guidance"):
        check_guidance(ModelConfig(str(schnell)), 2.0)


def test_a_negative_prompt_is_said_to_have_no_effect(schnell: Path, caplog: pytest.LogCaptureFixture) -> None:
    family: Any = load_family(ModelConfig(str(schnell)), CPU, torch.float32)
    with caplog.at_level(logging.WARNING):
        family.prepare_prompt("a fox", "blurred")
    assert [record.getMessage() for record in caplog.records] == ["Flux.1 draws without negative prompts: blurred"]


def test_sizes_that_its_packing_would_change_are_refused(schnell: Path) -> None:
    sampler = load_for_sampling(ModelConfig(str(schnell)), torch.float32, CPU)
    with pytest.raises(UserError, match=r"^--resolution 20: the model takes multiples of 8 pixels"):
        sampler(["a fox"], [torch.Generator()], 1, None, 20)


@pytest.mark.parametrize("which", LORA_TARGETS)
def test_a_lora_is_on_what_it_names_in_every_block_and_nowhere_else(schnell: Path, which: Any) -> None:
    config = ModelConfig(str(schnell), rank=2, lora_targets=which)
    family: Any = load_family(config, CPU, torch.bfloat16)
    assert family.denoiser.dtype == torch.bfloat16
    add_lora(family.denoiser, config, LORA_TARGETS, 0)
    found = [name for name, module in family.denoiser.named_modules() if hasattr(module, "lora_A")]
    linear = [name for name, module in family.denoiser.named_modules() if type(module) is torch.nn.Linear]
    left = {name for name in linear if "transformer_blocks" in name and ".lora_" not in name and "base_" not in name}
    # 8 projections of the joint block and 3 of each of two others; 4 and 2 of MLPs; 2 and 1 that modulate.
    assert len(found) == {"attention": 14, "attention_mlp": 22, "all": 26}[which]
    assert all("transformer_blocks." in name for name in found)
    assert (not left) == (which == "all")
