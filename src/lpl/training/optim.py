"""Optimizer and learning-rate schedule, from well-kept libraries."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from lpl.config import OptimConfig, TrainConfig
from lpl.errors import UserError
from lpl.training.one_by_one import of_optimi, suited
from lpl.training.optimizers import optimizer_class, optimizer_keywords, parameter_groups

WARMUP_STEPS = 500


def build_optimizer(parameters: list[torch.nn.Parameter], config: OptimConfig, learning_rate: float) -> Any:
    """The optimizer that --optimizer names, in up to two groups: biases and weights of norms do not decay.

    Raises:
        UserError: a package that is not installed, or keywords that the optimizer lacks.
    """
    cls = optimizer_class(config)
    keywords = optimizer_keywords(config, cls)
    if config.is_optimi:
        keywords = of_optimi(config) | keywords
    cls = suited(cls, config)
    groups = parameter_groups(parameters, config.decay_all, keywords, cls)
    with redirect_stdout(io.StringIO()):  # prodigyopt says at each start that its weight decay is decoupled
        return cls(groups, lr=learning_rate, **keywords)


def build_schedule(optimizer: Any, config: OptimConfig, num_steps: int) -> Any:
    """A schedule in optimizer steps of the run: it is stepped once per optimizer step, on every process alike.

    Raises:
        UserError: malformed --lr_step_rules.
    """
    warmup = config.lr_warmup_steps
    if warmup is None:
        warmup = 0 if config.lr_scheduler in ("constant", "piecewise_constant") else WARMUP_STEPS
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler}: {error}") from error


def scaled_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """The peak learning rate, after --scale_lr."""
    run = config.run
    factor = run.gradient_accumulation_steps * run.train_batch_size * num_processes if config.optim.scale_lr else 1
    return config.learning_rate * factor
