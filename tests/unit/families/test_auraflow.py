"""AuraFlow beyond the contract: what is cached of its text, the positions that it knows, layers of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_auraflow

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.families import kind_of, load_family
from lpl.families.auraflow import LORA_TARGETS, PUBLISHED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = Path(tiny_auraflow(tmp_path_factory.mktemp("auraflow") / "model"))
    return load_family(ModelConfig(str(folder)), CPU, torch.float32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ends", [True, False])
def test_captions_are_what_the_pipeline_encodes_on_whatever_side_it_fills_up(
    family: Any, side: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a tokenizer that ends none, to which no caption is no token."""
    tokenizer = family.pipeline.tokenizer
    monkeypatch.setattr(tokenizer, "padding_side", side)
    if not ends:
        monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", None)
    captions = ["", "a red fox", "a hare in a field " * 20]
    found, (theirs, mask, _, _) = family.encode_text(captions), family.pipeline.encode_prompt(captions, None, False)
    counts = (mask > 0).sum(1).tolist()
    assert counts[0] == ends
    assert found["lengths"].tolist() == [max(count, 1) for count in counts]
    noisy = torch.randn(1, 4, 4, 4)
    for n, count in enumerate(counts):
        row = found["prompt_embeds"][n]
        torch.testing.assert_close(row[:count], theirs[n][mask[n] > 0], rtol=1e-4, atol=1e-5)
        assert not row[count:].any()
        own, other = (
            family.denoise(family.denoiser, noisy, torch.tensor([0.3]), {"prompt_embeds": embeds[None]}, {})
            for embeds in (row, theirs[n])
        )
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_latents_beyond_the_positions_are_refused(family: Any) -> None:
    text = family.encode_text(["a red fox"])
    text = {"prompt_embeds": text["prompt_embeds"][0][None]}
    for height, width in ((16, 4), (4, 16)):  # as many as there are
        family.denoise(family.denoiser, torch.zeros(1, 4, height, width), torch.tensor([0.5]), text, {})
    for height, width in ((18, 4), (4, 18)):
        with pytest.raises(UserError, match=rf"latents of {height} x {width}: the model knows positions of up to 16 x"):
            family.denoise(family.denoiser, torch.zeros(1, 4, height, width), torch.tensor([0.5]), text, {})


def test_it_is_made_for_what_its_pipeline_draws() -> None:
    configs = PUBLISHED | {"transformer": {"sample_size": 64}}
    assert kind_of(ModelConfig("fal/AuraFlow-v0.3")).native_resolution(configs) == 1024


def test_lora_reaches_every_matrix_of_the_blocks(family: Any) -> None:
    denoiser = family.denoiser
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linear if "transformer_blocks" in name}
    assert len(blocks) == 16 + 8
    denoiser.add_adapter(LoraConfig(r=1, target_modules=list(LORA_TARGETS["all"])))
    assert {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")} == blocks
