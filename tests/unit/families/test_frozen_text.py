"""Text of families whose encoders stay frozen: in their files' precision, cut where the pipeline cuts, without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny_models import tiny_sd3

from lpl.config import ModelConfig
from lpl.data.filling import narrowed
from lpl.families import blueprint, load_family, plan_configs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose text encoders are stored in bfloat16."""
    folder = Path(tiny_sd3(tmp_path_factory.mktemp("halved") / "model"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipeline, part).to(torch.bfloat16).save_pretrained(folder / part)
    return folder


def test_encoders_keep_the_precision_of_their_files_and_so_does_what_is_cached(halved: Path) -> None:
    config = ModelConfig(str(halved))
    family: Any = load_family(config, CPU, torch.float32)
    assert {encoder.dtype for encoder in family.text_encoders} == {torch.bfloat16}
    assert family.denoiser.dtype == family.vae.dtype == torch.float32
    text = family.encode_text(["a fox"])
    assert {value.dtype for value in text.values()} == {torch.bfloat16}
    assert {value.dtype for value in narrowed(text, torch.float32).values()} == {torch.bfloat16}
    assert {value.dtype for value in family.encode_prompt("a fox", "").values()} == {torch.float32}
    plan = blueprint(plan_configs(config), config)
    assert {encoder.dtype for encoder in plan.text_encoders()} == {torch.bfloat16}  # type: ignore[attr-defined]


def test_text_of_several_lengths_is_what_the_pipeline_encodes(halved: Path, caplog: pytest.LogCaptureFixture) -> None:
    family: Any = load_family(ModelConfig(str(halved)), CPU, torch.float32)
    captions = ["", "a red fox", "a hare in a field of tall grass " * 10]
    with caplog.at_level(logging.WARNING):
        found = family.encode_text(captions)
        assert not caplog.records
        theirs, _, pooled, _ = family.pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
        caplog.clear()
        family.free_encoders()
    assert torch.equal(found["prompt_embeds"], theirs)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)
    assert [record.getMessage()[:38] for record in caplog.records] == ["1 captions were cut to 256 tokens, fir"]


def test_a_model_without_its_longest_encoder_is_what_the_pipeline_makes_of_it(tmp_path: Path) -> None:
    folder = Path(tiny_sd3(tmp_path / "model", t5=False))
    family: Any = load_family(ModelConfig(str(folder)), CPU, torch.float32)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    theirs, _, pooled, _ = pipeline.encode_prompt(["a fox"], None, None, do_classifier_free_guidance=False)
    for found in (family, load_family(ModelConfig(str(folder)), CPU, torch.float32, encoders_only=True)):
        text = found.encode_text(["a fox"])
        assert torch.equal(text["prompt_embeds"], theirs)
        assert torch.equal(text["pooled_prompt_embeds"], pooled)
    config = ModelConfig(str(folder))
    plan = blueprint(plan_configs(config), config)
    assert [ids.shape for ids in plan.tokens(2)] == [(2, 32), (2, 32)]
    assert plan.text(1)["prompt_embeds"].shape == theirs.shape
