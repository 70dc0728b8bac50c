"""The options of loss, noise and timesteps keep what holds of every run: it resumes bit for bit and may be split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch

OPTIONS = {
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "loss_weighting": "debiased",
    "loss_type": "huber",
    "pyramid_noise_iterations": 3,
    "timestep_distribution": "logit_normal",
    "logit_mean": -0.5,
    "timestep_sampling": "stratified",
    "timestep_bias_strategy": "earlier",
    "timestep_bias_multiplier": 2.0,
    "lpl_start": 1,
    "lpl_warmup_steps": 3,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
SPLIT = {"max_train_steps": 3, "adam_epsilon": 1e-2, "learning_rate": 1e-2}


def test_resumed_run_equals_the_whole(train: Any) -> None:
    options = OPTIONS | {"train_batch_size": 2, "gradient_accumulation_steps": 2, "lpl_weight": "auto"}
    whole = train(**options, output="whole")
    train(**options | {"max_train_steps": 3}, output="halves")
    resumed = train(**options, output="halves")
    a, b = resumed.unet(), whole.unet()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.losses() == whole.losses()
    assert list(whole.losses()["train_loss"]) == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def whole(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_in(tmp_path_factory.mktemp("whole") / "out", **OPTIONS | SPLIT, train_batch_size=8)


def assert_same_run(a: Any, b: Any) -> None:
    """Losses agree to float32, and so does what the gate let pass."""
    losses, expected = a.losses(), b.losses()
    assert losses.keys() == expected.keys()
    for name, values in expected.items():
        for step, value in values.items():
            assert losses[name][step] == pytest.approx(value, rel=2e-5), (name, step)
    ratio = "lpl/application_ratio"
    assert a.logged()[ratio] == pytest.approx(b.logged()[ratio])


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_accumulation_equals_a_larger_batch(train: Any, whole: Any, batch: int, accumulation: int) -> None:
    options = OPTIONS | SPLIT | {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert_same_run(train(**options, output="split"), whole)


def test_two_processes_equal_one_with_twice_the_batch(
    whole: Any, base_options: dict[str, Any], as_flags: Any, read_run: Any, tmp_path: Path
) -> None:
    options = {**base_options, **OPTIONS, **SPLIT, "output_dir": tmp_path / "two"}
    options |= {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    launch(["train", *as_flags(options)], 2)
    assert_same_run(read_run(tmp_path / "two"), whole)
