"""What an optimizer keeps and what it writes out while it steps, in bytes."""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import nn

from lpl.base.counter import StepCounter
from lpl.base.errors import UserError, on_one_line
from lpl.config import OPTIMIZERS, OptimConfig
from lpl.training.optimizers import FAILURES, averages_itself, build_optimizer
from lpl.training.per_parameter import ROUNDED_AT_ONCE

ROUNDING = 21
"""Bytes a value that torchao's stochastic rounding writes out: five tensors of four, and a mask."""
Shapes = tuple[tuple[int, ...], ...]
NAMES = {"adafactor": "Adafactor", "prodigy": "Prodigy", "schedulefree_adamw": "schedule-free"}


def state_name(config: OptimConfig) -> str:
    """The row's name in a plan."""
    name = config.optimizer_name
    return f"{NAMES.get(name, 'AdamW' if name in OPTIMIZERS else name.rpartition('.')[2])} state"


@cache
def state_size(config: OptimConfig, shapes: Shapes, device: str) -> int:
    """Bytes of an optimizer's state, which stays between steps.

    AdamW and schedule-free AdamW keep two tensors of the parameters' size; bitsandbytes two of a byte a value, and for
    each block of 256 values a float32. Adafactor keeps the second moment's means over the last and over the last but
    one dimension (whole for tensors of one dimension), and a first moment with beta1. Prodigy keeps AdamW's two, the
    parameters as they were (but not those that were all zeros, a saving that is left out here) and a sum of gradients;
    of the latter two only every slice_p-th value.

    Raises:
        UserError: a package.Class that does not step on tensors without data.
    """
    name, given = config.optimizer_name, config.optimizer_keywords
    total = sum(map(prod, shapes))
    if name == "adamw8bit":
        return 2 * total * 65 // 64
    if name == "adafactor":
        return 4 * (sum(map(_factored, shapes)) + (total if given.get("beta1") is not None else 0))
    if name == "prodigy":
        every = int(given.get("slice_p", 1))
        sliced = sum(-(-prod(s) // every) for s in shapes)
        return 4 * (2 * sliced + total * (2 if config.adam_beta1 > 0 else 1))
    if name in OPTIMIZERS:
        return 4 * total * (3 if given.get("amsgrad") else 2)
    if config.is_optimi:
        return round(total * _per_value(config)[0])
    return _counted(config, shapes, device)[0]


@cache
def workspace_size(config: OptimConfig, shapes: Shapes, device: str) -> int:
    """Bytes on top of the state while an optimizer steps.

    AdamW writes out sqrt(v): on a GPU of all parameters at once, on a CPU twice, of one parameter after another.
    Adafactor and Prodigy go from parameter to parameter everywhere: Adafactor writes out the square of a gradient, its
    approximation and the factors of that, Prodigy one tensor. Schedule-free AdamW takes all at once everywhere. On
    bfloat16 weights, and in the backward pass, all go from parameter to parameter.

    Raises:
        UserError: as state_size.
    """
    if config.is_optimi or config.rounds or config.fused_backward_pass:
        return max(one_step_size(config, shape, device) for shape in shapes)
    name, given = config.optimizer_name, config.optimizer_keywords
    total, largest = sum(map(prod, shapes)), max(map(prod, shapes))
    if name == "adamw8bit":
        return 0
    if name == "adafactor":
        return 4 * max(2 * prod(s) + _factored(s) for s in shapes)
    if name == "prodigy":
        return 4 * largest
    if name == "schedulefree_adamw":
        return 4 * (total if given.get("foreach", True) else largest)
    if name in OPTIMIZERS:
        return 4 * total if device == "cuda" else 2 * 4 * largest
    return _counted(config, shapes, device)[1]


def one_step_size(config: OptimConfig, shape: tuple[int, ...], device: str) -> int:
    """Bytes on top of the state while one parameter steps by itself.

    Meanwhile a bfloat16 weight and its gradient are there in float32; then the weight alone, with what rounding a piece
    of it writes out.
    """
    size = prod(shape)
    if config.is_optimi:
        return round(size * _per_value(config)[1])
    own = {"adamw8bit": 0, "adafactor": 4 * (2 * size + _factored(shape))}
    stepping = own.get(config.optimizer_name, 4 * size if device == "cuda" else 2 * 4 * size)
    return max(8 * size + stepping, 4 * size + ROUNDING * min(size, ROUNDED_AT_ONCE)) if config.rounds else stepping


@cache
def _per_value(config: OptimConfig) -> tuple[float, float]:
    """State and workspace of optimi's optimizers in bytes a value, counted on a CPU."""
    parameter = nn.Parameter(torch.ones(256, 256, dtype=getattr(torch, config.weights_dtype)))
    try:
        optimizer = build_optimizer([parameter], config, 1e-4)
        parameter.grad = torch.ones_like(parameter)
        with StepCounter() as counter:
            optimizer.step()
            state = counter.live
            counter.reset_peak()
            parameter.grad = torch.ones_like(parameter)
            held = counter.live - state
            optimizer.step()
            return state / parameter.numel(), max(0, counter.peak - state - held) / parameter.numel()
    except FAILURES as error:
        message = on_one_line(error, 200)
        raise UserError(f"--optimizer {config.optimizer}: its memory cannot be counted ({message})") from error


def _factored(shape: tuple[int, ...]) -> int:
    """Values that Adafactor keeps of a tensor's second moment."""
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] if len(shape) > 1 else prod(shape)


@cache
def _counted(config: OptimConfig, shapes: Shapes, device: str) -> tuple[int, int]:
    """State and workspace, counted in steps on tensors without data; for a GPU with foreach, where it exists."""
    try:
        with torch.device("meta"):
            parameters = [nn.Parameter(torch.empty(shape)) for shape in shapes]
            optimizer = build_optimizer(parameters, config, 1e-4)
            for group in optimizer.param_groups:
                if device == "cuda" and group.get("foreach", True) is None:
                    group["foreach"] = True
            if averages_itself(optimizer):
                optimizer.train()
            for p in parameters:
                p.grad = torch.empty_like(p)
            with StepCounter() as counter:
                optimizer.step()
                state = counter.live
                counter.reset_peak()
                optimizer.step()
            return state, counter.peak - state
    except FAILURES as error:
        message = on_one_line(error, 200)
        raise UserError(f"--optimizer {config.optimizer}: its memory cannot be counted ({message})") from error
