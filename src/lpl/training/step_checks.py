"""Which options that are counted in optimizer steps cannot act in a run of so many."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from lpl.config import TrainConfig, declared

logger = logging.getLogger("lpl")


def warn_of_steps(config: TrainConfig, steps: int) -> None:
    """Says by name, a line each, what a run of so many optimizer steps never reaches.

    A period that is too long is named only where it was asked for: the defaults are made for long runs. A warm-up is
    named always, for it changes what is trained.
    """
    for line in _never_reached(config, steps):
        logger.warning("%s", line)


def _never_reached(config: TrainConfig, steps: int) -> Iterator[str]:
    yield from _of_rate(config, steps)
    yield from _of_lpl(config, steps)
    if config.optim.use_ema:
        yield from _of_average(config, steps)
    usual, given = TrainConfig().flat(), config.flat()
    periods = {name: facts.period for name, facts in declared().items() if facts.period is not None}
    if config.logging.draws_images or config.data.holds_out:
        periods["validation_steps"] = "validation happens before the first step and after the last alone"
    for name, what in periods.items():
        if given[name] != usual[name] and given[name] > steps:
            yield f"--{name} {given[name]} is not reached in the run of {steps} steps: {what}; give at most {steps}"


def _of_rate(config: TrainConfig, steps: int) -> Iterator[str]:
    warmup = config.optim.warmup_steps
    if warmup >= steps:
        reached = (steps - 1) / warmup
        default = " (the default)" if config.optim.lr_warmup_steps is None else ""
        yield (
            f"--lr_warmup_steps {warmup}{default}: the run of {steps} steps never leaves the warm-up, and the learning "
            f"rate reaches {reached:.0%} of its peak: give fewer, such as {steps // 10}, or train longer"
        )
    if config.optim.lr_step_rules is not None:
        *rules, _ = config.optim.lr_step_rules.split(",")
        late = [rule for rule in rules if int(rule.split(":")[1]) >= steps]
        if late:
            yield (
                f"--lr_step_rules {config.optim.lr_step_rules}: the run of {steps} steps ends before what follows step "
                f"{late[0].split(':')[1]}: give earlier steps, or train longer"
            )


def _of_lpl(config: TrainConfig, steps: int) -> Iterator[str]:
    lpl = config.lpl
    if not lpl.use_lpl:
        return
    end = lpl.lpl_start + lpl.lpl_warmup_steps
    if lpl.lpl_start >= steps:
        yield (
            f"--lpl_start {lpl.lpl_start} is not reached in the run of {steps} steps: LPL never acts; start earlier, "
            "or say --no_use_lpl"
        )
    elif lpl.lpl_warmup_steps and end >= steps:
        yield (
            f"--lpl_warmup_steps {lpl.lpl_warmup_steps}: LPL's weight rises to step {end}, and the run of {steps} "
            "steps never has it in full: give fewer, or train longer"
        )


def _of_average(config: TrainConfig, steps: int) -> Iterator[str]:
    optim = config.optim
    updates = steps // optim.ema_update_every
    if not updates:
        yield (
            f"--ema_update_every {optim.ema_update_every} is not reached in the run of {steps} steps: the average "
            "stays what the run began with; give fewer, or leave --use_ema out"
        )
    elif optim.ema_update_after_step and updates <= optim.ema_update_after_step + 1:
        yield (
            f"--ema_update_after_step {optim.ema_update_after_step}: the run of {steps} steps has {updates} updates, "
            "so that the average is the weights themselves; give fewer, or leave --use_ema out"
        )
