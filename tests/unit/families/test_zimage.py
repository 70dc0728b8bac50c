"""Z-Image beyond the contract: captions at their own length, cut where the pipeline cuts; what is told of Turbo."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_zimage

from lpl.config import ModelConfig
from lpl.families import blueprint, load_family, plan_configs
from lpl.families.sampling import check_guidance
from lpl.families.zimage import LORA_TARGETS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_zimage(tmp_path_factory.mktemp("zimage") / "model"))


def test_captions_are_what_the_pipeline_encodes_filled_up_to_a_multiple(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family: Any = load_family(ModelConfig(str(folder)), CPU, torch.float32)
    captions = ["", "a red fox", "a hare in a field " * 40]
    given = list(captions)
    found = family.encode_text(given)
    assert given == captions
    theirs, _ = family.pipeline.encode_prompt(list(captions), CPU, False)
    assert [len(row) for row in theirs][2] == 512
    assert found["lengths"].tolist() == [len(row) for row in theirs]
    for row, own in zip(found["prompt_embeds"], theirs, strict=True):
        assert len(row) == -(-len(own) // 32) * 32
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-4, atol=1e-5)
        assert not row[len(own) :].any()
    with caplog.at_level(logging.WARNING):
        family.free_encoders()
    assert [record.getMessage()[:35] for record in caplog.records] == ["1 captions were cut to 512 tokens, "]


def test_another_template_is_another_text(folder: Path) -> None:
    family: Any = load_family(ModelConfig(str(folder)), CPU, torch.float32)
    before = family.text_key
    family.pipeline.tokenizer.chat_template += "\n"
    family.prepare_text()
    assert family.text_key != before


def test_turbo_is_drawn_in_few_steps_without_guidance(folder: Path, tmp_path: Path) -> None:
    turbo = ModelConfig(str(tiny_zimage(tmp_path / "turbo", turbo=True)))
    assert (check_guidance(turbo, None), check_guidance(ModelConfig(str(folder)), None)) == (0.0, 4.0)
    family: Any = load_family(turbo, CPU, torch.float32)
    assert (family.steps, family.guidance) == (9, 0.0)


def test_lora_reaches_every_matrix_of_the_blocks(folder: Path) -> None:
    config = ModelConfig(str(folder))
    denoiser: Any = blueprint(plan_configs(config), config).denoiser()
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linear if name.startswith(("layers", "noise_refiner", "context_refiner"))}
    assert len(blocks) == 3 * 7 + 2
    denoiser.add_adapter(LoraConfig(r=1, target_modules=list(LORA_TARGETS["all"])))
    assert {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")} == blocks
