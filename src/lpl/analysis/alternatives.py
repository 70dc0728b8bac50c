"""Choices around the one that was asked for, and the cheapest that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from lpl.analysis.needs import Needs, launched_estimate, launched_floor
from lpl.analysis.rehearsal import Rehearsal
from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.training.checks import suits

HEADROOM = 0.05
"""Share of the device's memory that is left for what is not counted."""
RANK = 16
HALF = "--mixed_precision bf16"


class Change(NamedTuple):
    """Another value of an option."""

    flags: str
    apply: Callable[[TrainConfig], TrainConfig]
    cost: int = 0
    """How dear it is: time, then rounding, then another optimizer, then an approximation, then another training."""


class Choice(NamedTuple):
    """A set of changes and what comes of it."""

    flags: str
    needs: Needs


def setting(flags: str, group: str, cost: int = 0, **values: Any) -> Change:
    """A change of fields in one group of options."""

    def apply(config: TrainConfig) -> TrainConfig:
        return replace(config, **{group: replace(getattr(config, group), **values)})

    return Change(flags, apply, cost)


def savings(config: TrainConfig) -> list[Change]:
    """What saves memory, as far as it changes anything; each is a no-op where an earlier one has said the same."""
    batch, steps = config.run.train_batch_size, config.run.gradient_accumulation_steps
    crop = max(8, config.data.crop_size // 2)
    single = f"--train_batch_size 1 --gradient_accumulation_steps {batch * steps}"  # the same trajectory
    changes = [
        setting("--no_use_lpl", "lpl", 32, use_lpl=False),
        setting(f"--rank {RANK}", "model", 16, rank=config.model.rank or RANK),
        setting("--gradient_checkpointing", "run", 1, gradient_checkpointing=True),
        _with_lpl(setting("--lpl_checkpointing true", "lpl", 1, lpl_checkpointing="true")),
        adafactor(config, 5),
        _with_adamw(setting("--use_8bit_adam", "optim", 4, use_8bit_adam=True)),
        bfloat16_weights(config, 5),
        setting(HALF, "run", 2, mixed_precision=_half(config.run.mixed_precision)),
        _with_lpl(setting("--lpl_dtype bfloat16", "lpl", 2, lpl_dtype=_half(config.lpl.lpl_dtype))),
        setting(single, "run", 2, train_batch_size=1, gradient_accumulation_steps=batch * steps),
        _unless(setting("--no_use_ema", "optim", 4, use_ema=False), lambda c: c.optim.final_weights == "ema"),
        _with_average(setting("--ema_device cpu", "optim", 1, ema_device="cpu")),
        _unless(fused_backward(3), lambda c: c.model.rank is not None),  # an adapter's gradients are small
        _with_lpl(setting(f"--lpl_crop {crop}", "lpl", 8, lpl_crop=min(crop, config.lpl.lpl_crop or crop))),
    ]
    return [change for change in map(_allowed, changes) if change.apply(config) != config]


def bfloat16_weights(config: TrainConfig, cost: int = 0) -> Change:
    """Weights in bfloat16, with the arithmetic that they need."""
    arithmetic = f"{HALF} " * (config.run.mixed_precision != "bf16")

    def apply(config: TrainConfig) -> TrainConfig:
        run, optim = replace(config.run, mixed_precision="bf16"), replace(config.optim, weights_dtype="bfloat16")
        return replace(config, run=run, optim=optim)

    return Change(f"{arithmetic}--weights_dtype bfloat16", apply, cost)


def fused_backward(cost: int = 0) -> Change:
    """Steps in the backward pass, without the clipping that they do not go with."""
    flags = "--fused_backward_pass --max_grad_norm 0"
    return setting(flags, "optim", cost, fused_backward_pass=True, max_grad_norm=0.0)


def adafactor(config: TrainConfig, cost: int = 0) -> Change:
    """Adafactor in the place of another optimizer."""
    optim = config.optim
    extra = " --no_use_8bit_adam" * optim.use_8bit_adam + " --optimizer_args=" * (optim.optimizer_args is not None)
    args = None if optim.optimizer_args is None else ""
    change = setting(
        f"--optimizer adafactor{extra}", "optim", cost, optimizer="adafactor", use_8bit_adam=False, optimizer_args=args
    )
    return _unless(change, lambda c: c.optim.optimizer == "adafactor")


def _with_average(change: Change) -> Change:
    return _unless(change, lambda config: not config.optim.use_ema)


def _with_adamw(change: Change) -> Change:
    return _unless(change, lambda config: config.optim.optimizer_name != "adamw" or bool(config.optim.optimizer_args))


def _allowed(change: Change) -> Change:
    """The change, but none where what comes of it is refused."""

    def refused(config: TrainConfig) -> bool:
        try:
            return not suits(change.apply(config))
        except UserError:  # beyond a bound, such as twice the largest batch
            return True

    return _unless(change, refused)


def _unless(change: Change, idle: Callable[[TrainConfig], bool]) -> Change:
    """The change, but none where it would say nothing."""
    return change._replace(apply=lambda config: config if idle(config) else change.apply(config))


def _half(precision: Any) -> Any:
    return {None: "bf16", "no": "bf16", "float32": "bfloat16"}.get(precision, precision)


def _with_lpl(change: Change) -> Change:
    """The change where it says something: not without LPL, nor to recompute what is recomputed."""

    def apply(config: TrainConfig) -> TrainConfig:
        changed = change.apply(config)
        same = replace(changed.lpl, lpl_checkpointing=config.lpl.lpl_checkpointing) == config.lpl
        idle = not config.lpl.use_lpl or (same and changed.lpl_checkpointing == config.lpl_checkpointing)
        return config if idle else changed

    return change._replace(apply=apply)


def fits(peak: int, memory: int) -> bool:
    """Whether a peak leaves enough of a device's memory for what is not counted."""
    return peak <= (1 - HEADROOM) * memory


def neighbours(config: TrainConfig) -> list[Change]:
    """One change each: every option that matters for memory, switched."""
    run, lpl, optim = config.run, config.lpl, config.optim
    changes = [setting("--no_use_lpl" if lpl.use_lpl else "--use_lpl", "lpl", use_lpl=not lpl.use_lpl)]
    if lpl.use_lpl:
        other = "false" if config.lpl_checkpointing else "true"
        changes.append(setting(f"--lpl_checkpointing {other}", "lpl", lpl_checkpointing=other))
        dtype = "bfloat16" if lpl.lpl_dtype == "float32" else "float32"
        changes.append(setting(f"--lpl_dtype {dtype}", "lpl", lpl_dtype=dtype))
    on = not run.gradient_checkpointing
    changes.append(setting(_switch("gradient_checkpointing", on), "run", gradient_checkpointing=on))
    precision = "bf16" if run.mixed_precision in (None, "no") else "no"
    changes.append(setting(f"--mixed_precision {precision}", "run", mixed_precision=precision))
    if config.model.rank is None:
        changes.append(setting(f"--rank {RANK}", "model", rank=RANK))
    else:
        changes.append(setting("without --rank", "model", rank=None))
    if optim.optimizer in ("adamw", "adamw8bit") and not optim.optimizer_args:
        on = not optim.use_8bit_adam
        changes.append(setting(_switch("use_8bit_adam", on), "optim", use_8bit_adam=on))
    changes.append(adafactor(config))
    if optim.weights_dtype == "float32":
        changes.append(bfloat16_weights(config))
    else:
        changes.append(setting("--weights_dtype float32", "optim", weights_dtype="float32"))
    if optim.fused_backward_pass:
        changes.append(setting("--no_fused_backward_pass", "optim", fused_backward_pass=False))
    else:
        changes.append(fused_backward())
    if optim.final_weights != "ema" and optim.optimizer != "schedulefree_adamw":
        changes.append(setting(_switch("use_ema", not optim.use_ema), "optim", use_ema=not optim.use_ema))
    if optim.use_ema:
        other = "same" if optim.ema_device == "cpu" else "cpu"
        changes.append(setting(f"--ema_device {other}", "optim", ema_device=other))
    sizes = {1, 2 * run.train_batch_size} - {run.train_batch_size}
    changes += [setting(f"--train_batch_size {size}", "run", train_batch_size=size) for size in sorted(sizes)]
    return [change for change in map(_allowed, changes) if change.apply(config) != config]


def _switch(name: str, on: bool) -> str:
    return f"--{name}" if on else f"--no_{name}"


def cheapest(
    config: TrainConfig, memory: int, rehearsal: Rehearsal, processes: int = 1, fixed: tuple[str, ...] = ()
) -> Choice | None:
    """The cheapest set of savings with which the run fits; None where none does.

    Args:
        config: the choice that was asked for.
        memory: of the device, in bytes.
        rehearsal: of the model.
        processes: of the run.
        fixed: flags of savings that are out of the question.
    """
    for flags, changed in _saved(config, fixed):
        if fits(launched_floor(changed, rehearsal, processes), memory):
            needs = launched_estimate(changed, rehearsal, processes)
            if fits(needs.peak, memory):
                return Choice(flags, needs)
    return None


def smallest(config: TrainConfig, rehearsal: Rehearsal, processes: int = 1, fixed: tuple[str, ...] = ()) -> Choice:
    """The choice with every saving, but for half precision where its copies of the weights cost more than it saves."""
    choices: list[Choice] = []
    for without in ((), (HALF,)):
        flags: list[str] = []
        changed = config
        for saving in savings(config):
            if saving.flags not in (*fixed, *without) and (after := saving.apply(changed)) != changed:
                flags, changed = [*flags, saving.flags], after
        if not choices or launched_floor(changed, rehearsal, processes) < choices[0].needs.peak:
            choices.append(Choice(" ".join(flags), launched_estimate(changed, rehearsal, processes)))
    return min(choices, key=lambda choice: (choice.needs.peak, len(choice.flags)))


def _saved(config: TrainConfig, fixed: tuple[str, ...]) -> Iterator[tuple[str, TrainConfig]]:
    """Every set of savings, cheapest first; a set in which one says nothing is another set already."""
    known = [saving for saving in savings(config) if saving.flags not in fixed]
    sets = [chosen for size in range(len(known) + 1) for chosen in combinations(known, size)]
    for chosen in sorted(sets, key=lambda c: (sum(saving.cost for saving in c), len(c))):
        steps = [config]
        for saving in chosen:
            steps.append(saving.apply(steps[-1]))
        if all(before != after for before, after in pairwise(steps)):
            yield " ".join(saving.flags for saving in chosen), steps[-1]
