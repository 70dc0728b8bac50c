"""Validation images of the full-size model never need more memory than training does."""

from __future__ import annotations

import pytest

from lpl.analysis.needs import estimate
from lpl.analysis.rehearsal import Rehearsal
from lpl.config.command_line import parse_train
from lpl.families import blueprint, plan_configs

LEAN = ("--gradient_checkpointing", "--mixed_precision=bf16")


@pytest.mark.parametrize(
    "flags",
    [
        ("--rank=4", "--no_use_lpl", "--resolution=1024"),
        pytest.param(("--rank=4", "--no_use_lpl", "--resolution=1536"), marks=pytest.mark.slow),
    ],
)
def test_validation_stays_below_the_training_peak(flags: tuple[str, ...]) -> None:
    """The leanest training: a small LoRA without LPL. A decoder beside the UNet would take 1 GiB more than it."""
    config = parse_train(["--validation_prompt=x", *LEAN, *flags])
    rehearsal = Rehearsal(blueprint(plan_configs(config.model), config.model))
    needs = estimate(config, rehearsal)
    training = max(needs.phases[phase] for phase in ("forward pass", "backward pass", "optimizer step"))
    assert needs.phases["validation"] < training
    _, decoding = rehearsal.validation(config)
    assert sum(needs.stays.values()) + rehearsal.vae() + decoding > training + 2**30
