"""Text encoders that come to the device a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BUILDS, tiny_flux, tiny_sdxl
from torch import nn

from lpl.base.errors import UserError
from lpl.config import DataConfig, ModelConfig, TrainConfig
from lpl.families import blueprint, load_family, plan_configs
from lpl.training.rehearsal import Rehearsal

CPU = torch.device("cpu")
DEVICE = torch.device("cpu", 0)
"""To torch another device than CPU, whose memory is the same."""


@pytest.mark.parametrize("build", BUILDS)
def test_captions_are_encoded_as_ever(build: Callable[[Path], Any], tmp_path: Path) -> None:
    build(tmp_path / "model")
    options = {"pretrained_model_name_or_path": str(tmp_path / "model")}
    whole: Any = load_family(ModelConfig(**options), CPU, torch.float32)
    parts: Any = load_family(ModelConfig(**options, offload_text_encoders=True), DEVICE, torch.float32)
    came: list[nn.Module] = []
    for encoder in parts.text_encoders:
        linear = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
        assert all(hasattr(module, "_diffusers_hook") for module in linear)
        for module in linear:
            module.register_forward_hook(lambda module, _, __: came.append(module))
    captions = ["a fox", "a much longer caption of a red fox in the snow"]
    wanted, found = whole.encode_text(captions), parts.encode_text(captions)
    assert came
    assert all(torch.equal(a, b) for name in wanted for a, b in zip(wanted[name], found[name], strict=True))
    assert parts.text_key == whole.text_key  # the same cache


def test_a_plan_counts_a_layer_and_not_the_encoders(tmp_path: Path) -> None:
    tiny_flux(tmp_path / "model")
    peaks = []
    for offloads, device in ((False, "cuda"), (True, "cuda"), (True, "cpu")):
        model = ModelConfig(str(tmp_path / "model"), offload_text_encoders=offloads)
        rehearsal = Rehearsal(blueprint(plan_configs(model), model), device)  # type: ignore[arg-type]
        peaks.append(rehearsal.caching(TrainConfig(model=model, data=DataConfig(resolution=16))))
        encoders = rehearsal._on_meta(rehearsal.blueprint.text_encoders)
    sizes = [p.nbytes for encoder in encoders for p in encoder.parameters()]
    assert peaks[0] - peaks[1] == sum(sizes) - max(sizes)  # the largest layer: an embedding
    assert peaks[2] == peaks[0]


def test_it_is_said_where_it_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_sdxl(tmp_path / "model")
    load_family(ModelConfig(str(tmp_path / "model"), offload_text_encoders=True), CPU, torch.float32)
    assert "--offload_text_encoders has no effect on a CPU" in caplog.text


def test_encoders_that_are_trained_stay() -> None:
    with pytest.raises(UserError, match="--offload_text_encoders with --train_text_encoder: what is trained stays"):
        ModelConfig("m", offload_text_encoders=True, train_text_encoder=True)
