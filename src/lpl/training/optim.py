"""Optimizer and learning-rate schedule, from well-kept libraries."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from lpl.base.errors import UserError
from lpl.config import OptimConfig, TrainConfig
from lpl.training.one_by_one import of_optimi, suited
from lpl.training.optimizers import FAILURES, averages_itself, optimizer_class, optimizer_keywords, parameter_groups
from lpl.training.sharded import join_optimizer, split_optimizer


def build_optimizer(
    parameters: list[torch.nn.Parameter],
    config: OptimConfig,
    learning_rate: float,
    components: Mapping[str, tuple[list[torch.nn.Parameter], float]] | None = None,
) -> Any:
    """The optimizer that --optimizer names, in up to two groups: biases and weights of norms do not decay.

    Args:
        parameters: what is trained at the learning rate.
        config: the options.
        learning_rate: after --scale_lr.
        components: by name, further parameters with a rate of their own, again in up to two groups each; a group has
            the name as its "component".

    Raises:
        UserError: a package that is not installed, or keywords that the optimizer lacks.
    """
    cls = optimizer_class(config)
    keywords = optimizer_keywords(config, cls)
    if config.is_optimi:
        keywords = of_optimi(config) | keywords
    cls = suited(cls, config)
    groups = parameter_groups(parameters, config.decay_all, keywords, cls)
    for name, (further, rate) in (components or {}).items():
        own = parameter_groups(further, config.decay_all, keywords, cls)
        groups += [group | {"lr": rate, "component": name} for group in own]
    with redirect_stdout(io.StringIO()):  # prodigyopt says at each start that its weight decay is decoupled
        return cls(groups, lr=learning_rate, **keywords)


def build_schedule(optimizer: Any, config: OptimConfig, num_steps: int) -> Any:
    """A schedule in optimizer steps of the run: it is stepped once per optimizer step, on every process alike.

    Raises:
        UserError: malformed --lr_step_rules.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler}: {error}") from error


def scaled_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """The peak learning rate, after --scale_lr."""
    return config.learning_rate * _scale(config, num_processes)


def split_components(
    parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig, num_processes: int
) -> tuple[list[torch.nn.Parameter], dict[str, tuple[list[torch.nn.Parameter], float]]]:
    """The parameters with the learning rate, and those of components that have their own, with it after --scale_lr.

    A component's parameters have names that begin with its own and a dot.
    """
    scale = _scale(config, num_processes)
    components = {
        part: ([p for name, p in parameters.items() if name.startswith(f"{part}.")], rate * scale)
        for part, rate in config.component_rates.items()
    }
    taken = {id(p) for own, _ in components.values() for p in own}
    return [p for p in parameters.values() if id(p) not in taken], components


def component_rates(optimizer: Any, rates: list[float]) -> dict[str, float]:
    """Of the rates of an optimizer's groups those of its components, as they are logged."""
    groups = zip(optimizer.param_groups, rates, strict=True)
    return {f"learning_rate/{group['component']}": rate for group, rate in groups if "component" in group}


def _scale(config: TrainConfig, num_processes: int) -> int:
    run = config.run
    return run.gradient_accumulation_steps * run.train_batch_size * num_processes if config.optim.scale_lr else 1


def check_steps(config: OptimConfig, device: torch.device) -> None:
    """Lets the optimizer take two steps on two small tensors, and its state go through a checkpoint.

    Raises:
        UserError: values that the optimizer refuses, one that needs more than gradients, or one whose state is not
            made of numbers and tensors.
    """
    try:
        dtype = getattr(torch, config.weights_dtype)
        parameters = [nn.Parameter(torch.ones(size, device=device, dtype=dtype)) for size in ((64, 64), (64,))]
        optimizer = build_optimizer(parameters, config, config.learning_rate or 1e-4)
        if averages_itself(optimizer):
            optimizer.train()
        for _ in range(2):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        tensors, rest = split_optimizer(optimizer.state_dict())
        optimizer.load_state_dict(join_optimizer(tensors, rest))
    except FAILURES as error:
        given = f" --optimizer_args {config.optimizer_args}" if config.optimizer_args else ""
        message = " ".join(str(error).split())[:300]
        raise UserError(f"--optimizer {config.optimizer_name}{given}: {type(error).__name__}: {message}") from error
