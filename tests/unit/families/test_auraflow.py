"""AuraFlow beyond the contract: what is cached of its text, sizes that it knows, layers of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_auraflow

from lpl.base.errors import UserError
from lpl.config import DataConfig, ModelConfig, TrainConfig
from lpl.families import kind_of, load_family
from lpl.families.auraflow import LORA_TARGETS, PUBLISHED
from lpl.training.preflight import check_sizes

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
    mask = tokenizer(
        captions, truncation=True, max_length=256, padding="max_length", return_tensors="pt"
    ).attention_mask
    found, theirs = family.encode_text(captions), family.pipeline.encode_prompt(captions, None, False)[0]
    counts = mask.sum(1).tolist()
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


def test_sizes_are_those_that_it_is_made_for_and_has_positions_for() -> None:
    """1024 pixels, whatever sample_size is, and up to 1536."""
    model = ModelConfig("fal/AuraFlow-v0.3")
    assert kind_of(model).native_resolution(PUBLISHED | {"transformer": {"sample_size": 64}}) == 1024
    for fits in ({"resolution": 1536}, {"resolution": 1024, "buckets": True}):
        check_sizes(TrainConfig(model=model, data=DataConfig(**fits)), PUBLISHED)
    for large, longest in (({"resolution": 1552}, 1552), ({"resolution": 1536, "buckets": True}, 2112)):
        with pytest.raises(
            UserError, match=f"sides of up to {longest} pixels, more than the 1536 that the model knows"
        ):
            check_sizes(TrainConfig(model=model, data=DataConfig(**large)), PUBLISHED)


def test_lora_reaches_every_matrix_of_the_blocks(family: Any) -> None:
    denoiser = family.denoiser
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name for name in linear if "transformer_blocks" in name}
    assert len(blocks) == 16 + 8
    denoiser.add_adapter(LoraConfig(r=1, target_modules=list(LORA_TARGETS["all"])))
    assert {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")} == blocks
