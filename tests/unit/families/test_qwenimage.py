"""Qwen-Image beyond the contract: captions at their own length, a VAE of videos that takes images, guidance."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_qwenimage

from lpl.config import ModelConfig
from lpl.families import blueprint, load_family, plan_configs
from lpl.families.qwenimage import LORA_TARGETS
from lpl.families.sampling import check_guidance

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_qwenimage(tmp_path_factory.mktemp("qwen") / "model"))


@pytest.fixture(scope="module")
def family(folder: Path) -> Any:
    return load_family(ModelConfig(str(folder)), CPU, torch.float32)


def test_captions_are_what_the_pipeline_encodes_filled_up_to_a_multiple(
    family: Any, caplog: pytest.LogCaptureFixture
) -> None:
    captions = ["", "a red fox", "a hare in a field " * 60]
    found = family.encode_text(captions)
    theirs, mask = family.pipeline.encode_prompt([" ", *captions[1:]], CPU)
    assert found["lengths"].tolist() == mask.sum(1).tolist()
    assert found["lengths"][2] == 1024
    for row, own, length in zip(found["prompt_embeds"], theirs, mask.sum(1), strict=True):
        assert len(row) == -(-int(length) // 32) * 32
        torch.testing.assert_close(row[:length], own[:length], rtol=1e-4, atol=1e-5)
        assert not row[length:].any()
    with caplog.at_level(logging.WARNING):
        family.free_encoders()
    assert [record.getMessage()[:36] for record in caplog.records] == ["1 captions were cut to 1024 tokens, "]


def test_another_template_is_another_text(folder: Path, family: Any) -> None:
    other: Any = load_family(ModelConfig(str(folder)), CPU, torch.float32, encoders_only=True)
    assert other.text_key == family.text_key
    other.pipeline.prompt_template_encode += "\n"
    other.prepare_text()
    assert other.text_key != family.text_key


def test_images_are_videos_of_one_frame_to_its_vae(folder: Path, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    pixels = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels.unsqueeze(2)).latent_dist
        mean, std = family.encode_images(pixels)
        assert torch.equal(mean, posterior.mean.squeeze(2))
        assert torch.equal(std, posterior.std.squeeze(2))
        image = theirs.decode(mean.unsqueeze(2)).sample
        assert torch.equal(family.vae.decode(mean).sample, image.squeeze(2))
        assert torch.equal(family.vae.decode(mean.unsqueeze(2)).sample, image)
    shapes: list[Any] = []
    monkeypatch.setattr("lpl.families.pipeline_family.DECODED_PIXELS", 32)
    handle = family.vae.decoder.register_forward_hook(lambda _, given, out: shapes.append(given[0].shape[2:]))
    assert family.decode(torch.zeros(1, 4, 12, 8)).size == (32, 48)
    handle.remove()
    assert max(side for shape in shapes for side in shape) == 8
    assert len(shapes) > 1


def test_no_negative_prompt_is_a_space_and_one_is_no_guidance(folder: Path, family: Any) -> None:
    assert check_guidance(ModelConfig(str(folder)), None) == 4.0
    assert [family.guided(scale, 2) for scale in (1.0, 3.0)] == [
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    ]
    found = family.encode_prompt("a red fox", "")
    theirs, _ = family.pipeline.encode_prompt(" ", CPU)
    torch.testing.assert_close(found["negative_prompt_embeds"], theirs)


def test_lora_reaches_every_matrix_of_the_blocks(folder: Path) -> None:
    config = ModelConfig(str(folder))
    denoiser: Any = blueprint(plan_configs(config), config).denoiser()
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linear if name.startswith("transformer_blocks")}
    assert len(blocks) == 2 * 14
    denoiser.add_adapter(LoraConfig(r=1, target_modules=list(LORA_TARGETS["all"])))
    assert {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")} == blocks
