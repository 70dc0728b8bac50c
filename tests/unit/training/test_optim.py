"""Optimizer, schedule and average."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from lpl.base.errors import UserError
from lpl.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from lpl.training.optimizers import build_optimizer, build_schedule, scaled_learning_rate

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {"lr_warmup_steps": 3},
    "linear": {"lr_warmup_steps": 1},
    "cosine": {"lr_warmup_steps": 1},
    "cosine_with_restarts": {"lr_warmup_steps": 1, "lr_num_cycles": 2},
    "polynomial": {"lr_warmup_steps": 0, "lr_power": 2.0},
    "piecewise_constant": {"lr_step_rules": "1:2,0.5:4,0.1"},
}
STEPS = 5


def expected_rates(name: str, options: dict[str, Any], steps: int = STEPS) -> list[float]:
    """diffusers' schedule, stepped once per optimizer step."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(
        name,
        optimizer,
        step_rules=options.get("lr_step_rules"),
        num_warmup_steps=options.get("lr_warmup_steps", 0),
        num_training_steps=steps,
        num_cycles=options.get("lr_num_cycles", 1),
        power=options.get("lr_power", 1.0),
    )
    rates = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


def test_every_schedule_of_diffusers_is_here() -> None:
    assert sorted(SCHEDULES) == sorted(kind.value for kind in SchedulerType)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_counts_optimizer_steps_whatever_the_accumulation(train: Any, name: str) -> None:
    options = SCHEDULES[name] | {"lr_scheduler": name, "max_train_steps": STEPS, "use_lpl": False}
    run = train(**options, gradient_accumulation_steps=3)
    logged = run.logged()["learning_rate"]
    assert list(logged) == list(range(1, STEPS + 1))
    assert list(logged.values()) == pytest.approx(expected_rates(name, SCHEDULES[name]), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("constant", 1.0), ("linear", 1 / 500), ("constant_with_warmup", 1 / 500)]
)
def test_warm_up_is_500_steps_where_there_is_one(name: str, expected: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([parameter], OptimConfig(), 1.0)
    schedule = build_schedule(optimizer, OptimConfig(lr_scheduler=name), 2000)  # type: ignore[arg-type]
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(expected)]


def test_optimizer_has_the_options() -> None:
    options = OptimConfig(adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=1e-6)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1, 1))], options, 0.3)
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.3, (0.8, 0.95), 0.1, 1e-6)


def test_8bit_adam_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"--use_8bit_adam needs bitsandbytes: pip install .*\[optim\]"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimConfig(use_8bit_adam=True), 1e-3)


def test_learning_rate_defaults_and_scaling() -> None:
    run = RunConfig(train_batch_size=3, gradient_accumulation_steps=4)
    assert scaled_learning_rate(TrainConfig(run=run), 2) == 1e-5
    assert scaled_learning_rate(TrainConfig(run=run, model=ModelConfig(rank=4)), 2) == 1e-4
    scaled = TrainConfig(run=run, optim=OptimConfig(learning_rate=1e-4, scale_lr=True))
    assert scaled_learning_rate(scaled, 2) == pytest.approx(1e-4 * 3 * 4 * 2)


def test_scaled_rate_is_what_trains(train: Any) -> None:
    run = train(scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-5, max_train_steps=1)
    assert run.logged()["learning_rate"][1] == pytest.approx(6e-5)
