"""What FSDP2 leaves on each GPU: arithmetic on the tiny model, against a model that is really split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpl.analysis.needs import estimate, gathered_sizes, launched_estimate, launched_floor, split_estimate
from lpl.config import TrainConfig
from lpl.config.command_line import parse_train
from lpl.training.launch import as_launched
from lpl.training.rehearsal import Rehearsal


@pytest.fixture(scope="module")
def config(model: Path) -> TrainConfig:
    argv = [f"--pretrained_model_name_or_path={model}", "--resolution=64", "--mixed_precision=no", "--use_ema"]
    return parse_train(argv)


def test_every_weight_belongs_to_one_block_or_to_none(config: TrainConfig, rehearsal: Rehearsal) -> None:
    blocks, rest = gathered_sizes(rehearsal, config)
    assert sum(blocks) + rest == rehearsal.parameters(config).size
    assert len(blocks) > 5
    assert max(blocks) < rehearsal.parameters(config).size / 2
    assert rest > 0


def test_what_stays_is_split(config: TrainConfig, rehearsal: Rehearsal) -> None:
    alone, split = estimate(config, rehearsal), split_estimate(config, rehearsal, 4)
    for name in ("UNet weights", "AdamW state", "EMA"):
        assert split.stays[name] == alone.stays[name] / 4
    assert split.stays["VAE, float32"] == alone.stays["VAE, float32"]
    assert split.gradients == alone.gradients / 4
    blocks, rest = gathered_sizes(rehearsal, config)
    assert split.stays["gathered blocks"] == sum(sorted(blocks)[-2:]) + rest
    step = "optimizer step"  # the peak of all is caching, which nobody splits
    assert split.phases[step] < estimate(config, rehearsal, 4).phases[step]


def test_more_processes_need_less_down_to_what_is_each_ones_own(config: TrainConfig, rehearsal: Rehearsal) -> None:
    peaks = [split_estimate(config, rehearsal, n).peak for n in (2, 4, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert all(launched_floor(config, rehearsal, n) <= split_estimate(config, rehearsal, n).peak for n in (2, 64))


def test_the_launch_says_whether_it_is_split(config: TrainConfig, rehearsal: Rehearsal) -> None:
    with as_launched(2, True):
        assert launched_estimate(config, rehearsal, 2) == split_estimate(config, rehearsal, 2)
    with as_launched(2, False):
        assert launched_estimate(config, rehearsal, 2) == estimate(config, rehearsal, 2)


def measure(folder: Path, model: str) -> None:
    """One of two processes: writes the bytes that it holds of a model that FSDP2 has split."""
    from diffusers import UNet2DConditionModel
    from launching import ShardingAccelerator

    accelerator = ShardingAccelerator()
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    unet, _ = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters()))
    held = sum(p.to_local().numel() * p.element_size() for p in unet.parameters())
    (folder / str(accelerator.process_index)).write_text(str(held))


def test_a_model_that_is_really_split_has_those_weights(
    config: TrainConfig, rehearsal: Rehearsal, tmp_path: Path, model: Path
) -> None:
    import accelerate
    from launching import FSDP

    from lpl.training.launch import environment

    with environment({"ACCELERATE_USE_CPU": "true"} | FSDP):
        accelerate.debug_launcher(measure, (tmp_path, str(model)), num_processes=2)
    held = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    weights: Any = split_estimate(config, rehearsal, 2).stays["UNet weights"]
    assert sum(held) == rehearsal.parameters(config).size
    assert max(held) == pytest.approx(weights, rel=0.02)  # what does not divide evenly goes to the first
