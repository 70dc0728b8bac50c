"""Lumina2 beyond the contract: what is cached of its text, lengths that no device is asked for, layers of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_lumina2

from lpl.config import ModelConfig
from lpl.families import load_family
from lpl.families.lumina2 import LORA_TARGETS, CaptionMask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = Path(tiny_lumina2(tmp_path_factory.mktemp("lumina2") / "model"))
    return load_family(ModelConfig(str(folder)), CPU, torch.float32)


def test_captions_are_what_the_pipeline_encodes_and_none_is_without_the_system_prompt(family: Any) -> None:
    captions = ["", "a red fox", "a hare in a field " * 20]
    found = family.encode_text(captions)
    encode = family.pipeline.encode_prompt
    theirs, mask, none, none_mask = encode(captions[1:], device=CPU, negative_prompt=["", ""])
    theirs, counts = torch.cat([none[:1], theirs]), [int(none_mask[0].sum()), *mask.sum(1).tolist()]
    assert found["lengths"].tolist() == counts
    assert counts[0] < 4 < counts[1] < counts[2] == 256
    for row, own, count in zip(found["prompt_embeds"], theirs, counts, strict=True):
        assert len(row) == -(-count // 32) * 32
        torch.testing.assert_close(row[:count], own[:count], rtol=1e-4, atol=1e-5)
        assert not row[count:].any()
    before = family.text_key
    family.pipeline.system_prompt += " Do."
    family.prepare_text()
    assert family.text_key != before


def test_a_mask_is_its_lengths_without_asking_the_device(family: Any) -> None:
    mask = CaptionMask([2, 3], CPU)
    assert torch.equal(mask.bool(), torch.tensor([[True, True, False], [True, True, True]]))
    assert (mask.shape, mask.sum(dim=1).tolist()) == ((2, 3), [2, 3])
    assert CaptionMask([2, 3], torch.device("meta")).sum(dim=1).tolist() == [2, 3]


def test_lora_reaches_every_matrix_of_the_blocks(family: Any) -> None:
    denoiser = family.denoiser
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linear if name.startswith(("layers", "noise_refiner", "context_refiner"))}
    assert len(blocks) == 4 * 7 + 3
    denoiser.add_adapter(LoraConfig(r=1, target_modules=list(LORA_TARGETS["all"])))
    assert {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")} == blocks
