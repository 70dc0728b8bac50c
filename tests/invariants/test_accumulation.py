"""How a global batch is split over micro-batches and processes changes nothing but the order of additions.

AdamW's epsilon is large here, which makes an update a smooth function of the gradient (at most rate / epsilon times
its error); with 1e-8 the update is nearly the gradient's sign, and rounding flips it where a gradient is all but 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import launch

STEPS, RATE, EPSILON = 3, 1e-2, 1e-2
FLOAT_ERROR = 1e-6
"""Relative rounding of a gradient: sums of up to 8 terms and a few thousand products, float32."""
OPTIONS = {
    "max_train_steps": STEPS,
    "learning_rate": RATE,
    "adam_epsilon": EPSILON,
    "train_batch_size": 8,
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "max_grad_norm": 0.5,
}


def assert_same_run(a: Any, b: Any) -> None:
    """Losses agree to float32; weights to the update's slope times the gradient's rounding."""
    losses, expected = a.losses(), b.losses()
    assert losses.keys() == expected.keys()
    assert {"diffusion_loss", "lpl/loss", "lpl/weighted_loss", "gradient_norm"} <= losses.keys()
    for name, values in expected.items():
        assert list(losses[name]) == list(values) == list(range(1, STEPS + 1))
        for step, value in values.items():
            assert losses[name][step] == pytest.approx(value, rel=2e-5), (name, step)
    tolerance = STEPS * RATE / EPSILON * FLOAT_ERROR
    for name, value in b.unet().items():
        assert (a.unet()[name] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


@pytest.fixture(scope="module")
def whole(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_in(tmp_path_factory.mktemp("whole") / "out", **OPTIONS)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_accumulation_equals_a_larger_batch(train: Any, whole: Any, batch: int, accumulation: int) -> None:
    options = OPTIONS | {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert_same_run(train(**options, output="split"), whole)


def test_a_budget_decodes_the_same_in_every_split(train: Any) -> None:
    options = OPTIONS | {"lpl_budget": 0.3, "lpl_weight": 1.0}
    whole = train(**options, output="whole")
    split = train(**options | {"train_batch_size": 2, "gradient_accumulation_steps": 4}, output="split")
    assert_same_run(split, whole)
    assert sum(whole.logged()["lpl/cost"].values()) > 0


def test_a_budget_logs_steps_of_which_no_sample_passes(train: Any) -> None:
    """One sample a step and a narrow gate: in some windows LPL's value is a mean over no samples, and not logged."""
    budget = {"lpl_budget": 0.3, "lpl_weight": 1.0, "lpl_t_threshold": 300}
    run = train(**OPTIONS | budget | {"train_batch_size": 1, "max_train_steps": 12})
    logged = run.logged()
    passed = {step for step, ratio in logged["lpl/application_ratio"].items() if ratio}
    assert 0 < len(passed) < 12
    assert logged["lpl/loss"].keys() == passed


def test_reduction_of_the_diffusers_project_depends_on_the_split(train: Any) -> None:
    """What `expected` exists to avoid; if this fails the test above says nothing about the reduction."""
    options = OPTIONS | {"max_train_steps": 1}
    one = train(**options, lpl_reduction="gated", output="one")
    split = options | {"train_batch_size": 1, "gradient_accumulation_steps": 8}
    many = train(**split, lpl_reduction="gated", output="many")
    ratio = many.logged()["lpl/weighted_loss"][1] / one.logged()["lpl/weighted_loss"][1]
    assert abs(ratio - 1) > 0.05


def test_auto_weight_and_share_do_not_depend_on_the_split(train: Any) -> None:
    options = OPTIONS | {"lpl_weight": "auto", "lpl_t_threshold": 300}
    one = train(**options, output="one").logged()
    many = train(**options | {"train_batch_size": 1, "gradient_accumulation_steps": 8}, output="many").logged()
    for step in (2, 3):
        assert many["lpl/weight"][step] == pytest.approx(one["lpl/weight"][step], rel=1e-4)
        assert many["lpl/gradient_share"][step] == pytest.approx(one["lpl/gradient_share"][step], rel=1e-4)


def test_two_processes_equal_one_with_twice_the_batch(
    whole: Any, base_options: dict[str, Any], as_flags: Any, read_run: Any, tmp_path: Path
) -> None:
    options = {**base_options, **OPTIONS, "train_batch_size": 4, "output_dir": tmp_path / "two"}
    launch(["train", *as_flags(options)], 2)
    assert_same_run(read_run(tmp_path / "two"), whole)
