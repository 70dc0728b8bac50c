"""Sana: what is cached of its text, and schedules that are of flow matching by another name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_sana

from lpl.config import ModelConfig
from lpl.families import load_family
from lpl.families.sana import INSTRUCTION
from lpl.families.schedulers import is_flow, training_schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_family(ModelConfig(str(tiny_sana(tmp_path_factory.mktemp("sana") / "model"))), CPU, torch.float32)


@pytest.mark.parametrize("caption", ["a red fox", "", "a hare in a field of tall grass " * 4, "a hill " * 60])
def test_tokens_that_count_are_cached_and_are_the_pipelines(family: Any, caption: str) -> None:
    """No caption is what the pipeline has for no negative prompt, without the instruction before it."""
    instruction = INSTRUCTION if caption else None
    theirs, mask, _, _ = family.pipeline.encode_prompt(
        [caption], do_classifier_free_guidance=False, device=CPU, complex_human_instruction=instruction
    )
    other, together = family.encode_text(["another", caption]), int(mask.sum())
    (embeds, counted) = (other[name][1] for name in ("prompt_embeds", "prompt_attention_mask"))
    assert len(embeds) == len(counted) == min(300, -(-together // 32) * 32)
    assert torch.equal(embeds, theirs[0, : len(embeds)])
    assert torch.equal(counted, mask[0, : len(counted)])
    assert int(counted.sum()) == together


def test_its_posterior_has_no_width(family: Any) -> None:
    mean, std = family.encode_images(torch.rand(1, 3, 16, 16) * 2 - 1)
    assert mean.shape == std.shape == (1, 4, 4, 4)
    assert not std.any()


def test_a_scheduler_of_flow_sigmas_is_of_flow_matching() -> None:
    said = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    schedule = training_schedule(said)
    assert (schedule.is_flow, schedule.shift) == (True, 3.0)
    assert not is_flow(said | {"use_flow_sigmas": False})


def test_a_large_image_is_decoded_in_tiles(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    decoder = family.vae.decoder
    monkeypatch.setattr("lpl.families.pipeline_family.DECODED_PIXELS", 64)
    handle = decoder.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[2:]))
    image = family.decode(torch.zeros(1, 4, 24, 16))
    handle.remove()
    assert image.size == (64, 96)
    assert max(side for shape in seen for side in shape) == 16
    assert len(seen) > 1
