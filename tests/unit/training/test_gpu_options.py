"""What a GPU cannot do is refused or said, by what torch tells of it; no GPU is needed."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lpl.base.errors import UserError
from lpl.config import LoggingConfig, LPLConfig, RunConfig, TrainConfig
from lpl.training import engine
from lpl.training.checks import warn_of_decoder
from lpl.training.engine import build_accelerator


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that makes bfloat16 tensors but computes with them by emulation, as those before Ampere do."""

    def accelerator(mixed_precision: str | None = None, **_: Any) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), mixed_precision=mixed_precision or "no", num_processes=1)

    monkeypatch.setattr(engine, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (TrainConfig(run=RunConfig(mixed_precision="bf16")), "--mixed_precision bf16: .* use fp16"),
        (TrainConfig(lpl=LPLConfig(lpl_dtype="bfloat16")), "--lpl_dtype bfloat16: .* use float32 or float16"),
    ],
)
def test_emulated_bfloat16_is_refused(old_gpu: None, config: TrainConfig, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build_accelerator(config)


@pytest.mark.parametrize(
    ("config", "capability", "slow"),
    [
        (TrainConfig(), (8, 0), True),
        (TrainConfig(), (12, 0), True),
        (TrainConfig(), (7, 5), False),  # has none for float32
        (TrainConfig(run=RunConfig(allow_tf32=True)), (9, 0), False),
        (TrainConfig(lpl=LPLConfig(lpl_dtype="bfloat16")), (9, 0), False),
        (TrainConfig(lpl=LPLConfig(use_lpl=False)), (9, 0), False),
    ],
)
def test_a_decoder_without_tensor_cores_is_told_of(
    config: TrainConfig, capability: Any, slow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lpl"):
        warn_of_decoder(config, capability)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "LPL's decoder runs in float32 without tensor cores"
    ] * slow


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched without a GPU and without a word of it, each of several was a run of its own into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine.Accelerator, "num_processes", 1)
    with pytest.raises(
        UserError, match=r"WORLD_SIZE is 2, but on a cpu accelerate joins 1, .* ACCELERATE_USE_CPU=true"
    ):
        build_accelerator(TrainConfig(logging=LoggingConfig(report_to="none")))
