"""Variations of a run's options, and the cheapest one that fits a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from lpl.analysis.needs import Needs, launched_estimate, launched_floor
from lpl.base.errors import UserError
from lpl.config import TrainConfig
from lpl.training.checks import suits
from lpl.training.rehearsal import Rehearsal

HEADROOM = 0.05
"""Share of the device's memory that is left for what is not counted."""
RANK = 16
HALF = "--mixed_precision bf16"


class Change(NamedTuple):
    """New values for some options."""

    flags: str
    values: dict[str, Any]
    cost: int = 0
    """How costly it is; rising from time, rounding, another optimizer, an approximation, another training."""
    idle: Callable[[TrainConfig], bool] = lambda config: False
    """Whether the change would have no effect."""

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The options with these values; unchanged where that has no effect, or is refused."""
        try:
            changed = config if self.idle(config) else config.changed(**self.values)
        except UserError:  # beyond a limit, such as twice the largest batch
            return config
        return changed if suits(changed) else config


class Choice(NamedTuple):
    """A set of changes, and what the run then needs."""

    flags: str
    needs: Needs


def setting(
    cost: int = 0, flags: str = "", idle: Callable[[TrainConfig], bool] = lambda config: False, **values: Any
) -> Change:
    """A change of options; its flags follow from the values unless given."""
    told = (f"{'--' if v else '--no_'}{n}" if isinstance(v, bool) else f"--{n} {v}" for n, v in values.items())
    return Change(flags or " ".join(told), values, cost, idle)


def savings(config: TrainConfig) -> list[Change]:
    """Changes that save memory, those that have an effect; one has none where an earlier one set the same."""
    batch, steps = config.run.train_batch_size, config.run.gradient_accumulation_steps
    crop = max(8, config.data.crop_size // 2)
    half = "bf16" if config.run.mixed_precision in (None, "no") else config.run.mixed_precision
    no_lpl, no_average = (lambda c: not c.lpl.use_lpl), (lambda c: not c.optim.use_ema)
    unquantisable = lambda c: c.model.quantize_base is not None or c.model.rank is None or c.model.use_dora  # noqa: E731
    not_plain_adamw = lambda c: c.optim.optimizer_name != "adamw" or bool(c.optim.optimizer_args)  # noqa: E731
    changes = [
        setting(32, use_lpl=False),
        setting(16, rank=config.model.rank or RANK),
        setting(1, gradient_checkpointing=True),
        setting(1, idle=lambda c: no_lpl(c) or c.lpl_checkpointing, lpl_checkpointing="true"),
        adafactor(config, 5),
        setting(4, idle=not_plain_adamw, use_8bit_adam=True),
        bfloat16_weights(config, 5),
        setting(2, mixed_precision=half),
        setting(2, idle=no_lpl, lpl_dtype="bfloat16" if config.lpl.lpl_dtype == "float32" else config.lpl.lpl_dtype),
        setting(1, idle=lambda c: c.model.train_text_encoder, offload_text_encoders=True),
        *(setting(cost, idle=unquantisable, quantize_base=kind) for kind, cost in (("int8", 3), ("nf4", 6))),
        setting(8, idle=lambda c: c.model.offload_blocks is not None, offload_blocks=1.0),
        setting(2, train_batch_size=1, gradient_accumulation_steps=batch * steps),  # trains the same way
        setting(4, idle=lambda c: c.optim.final_weights == "ema", use_ema=False),
        setting(1, idle=no_average, ema_device="cpu"),
        fused_backward(3, idle=lambda c: c.model.rank is not None),  # an adapter's gradients are small
        setting(8, idle=no_lpl, lpl_crop=min(crop, config.lpl.lpl_crop or crop)),
    ]
    return [change for change in changes if change.apply(config) != config]


def bfloat16_weights(config: TrainConfig, cost: int = 0) -> Change:
    """Weights in bfloat16, with the mixed precision that they need."""
    arithmetic = f"{HALF} " * (config.run.mixed_precision != "bf16")
    return setting(cost, f"{arithmetic}--weights_dtype bfloat16", mixed_precision="bf16", weights_dtype="bfloat16")


def fused_backward(cost: int = 0, **more: Any) -> Change:
    """Optimizer steps in the backward pass, and no gradient clipping, which they exclude."""
    flags = "--fused_backward_pass --max_grad_norm 0"
    return setting(cost, flags, fused_backward_pass=True, max_grad_norm=0.0, **more)


def adafactor(config: TrainConfig, cost: int = 0) -> Change:
    """Adafactor instead of another optimizer."""
    optim = config.optim
    extra = " --no_use_8bit_adam" * optim.use_8bit_adam + " --optimizer_args=" * (optim.optimizer_args is not None)
    return setting(
        cost,
        f"--optimizer adafactor{extra}",
        idle=lambda c: c.optim.optimizer == "adafactor",
        optimizer="adafactor",
        use_8bit_adam=False,
        optimizer_args=None if optim.optimizer_args is None else "",
    )


def fits(peak: int, memory: int) -> bool:
    """Whether a peak leaves enough of a device's memory for what is not counted."""
    return peak <= (1 - HEADROOM) * memory


def neighbours(config: TrainConfig) -> list[Change]:
    """One change each: every option that matters for memory, switched."""
    run, lpl, optim = config.run, config.lpl, config.optim
    changes = [setting(use_lpl=not lpl.use_lpl)]
    if lpl.use_lpl:
        changes.append(setting(lpl_checkpointing="false" if config.lpl_checkpointing else "true"))
        changes.append(setting(lpl_dtype="bfloat16" if lpl.lpl_dtype == "float32" else "float32"))
    changes.append(setting(gradient_checkpointing=not run.gradient_checkpointing))
    changes.append(setting(mixed_precision="bf16" if run.mixed_precision in (None, "no") else "no"))
    changes.append(setting(rank=RANK) if config.model.rank is None else setting(flags="without --rank", rank=None))
    if optim.optimizer in ("adamw", "adamw8bit") and not optim.optimizer_args:
        changes.append(setting(use_8bit_adam=not optim.use_8bit_adam))
    changes.append(adafactor(config))
    is_wide = optim.weights_dtype == "float32"
    changes.append(bfloat16_weights(config) if is_wide else setting(weights_dtype="float32"))
    changes.append(setting(fused_backward_pass=False) if optim.fused_backward_pass else fused_backward())
    if optim.final_weights != "ema" and optim.optimizer != "schedulefree_adamw":
        changes.append(setting(use_ema=not optim.use_ema))
    if optim.use_ema:
        changes.append(setting(ema_device="same" if optim.ema_device == "cpu" else "cpu"))
    sizes = {1, 2 * run.train_batch_size} - {run.train_batch_size}
    changes += [setting(train_batch_size=size) for size in sorted(sizes)]
    return [change for change in changes if change.apply(config) != config]


def cheapest(
    config: TrainConfig, memory: int, rehearsal: Rehearsal, processes: int = 1, fixed: tuple[str, ...] = ()
) -> Choice | None:
    """The cheapest set of savings with which the run fits into `memory` bytes; None where none does.

    `fixed` are the flags of savings that must not be used.
    """
    for flags, changed in _saved(config, fixed):
        if fits(launched_floor(changed, rehearsal, processes), memory):
            needs = launched_estimate(changed, rehearsal, processes)
            if fits(needs.peak, memory):
                return Choice(flags, needs)
    return None


def smallest(config: TrainConfig, rehearsal: Rehearsal, processes: int = 1, fixed: tuple[str, ...] = ()) -> Choice:
    """The choice with every saving, except half precision where its copies of the weights cost more than it saves."""
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
    """Every set of savings, cheapest first, without sets in which one has no effect (a smaller set is the same)."""
    known = [saving for saving in savings(config) if saving.flags not in fixed]
    sets = [chosen for size in range(len(known) + 1) for chosen in combinations(known, size)]
    for chosen in sorted(sets, key=lambda c: (sum(saving.cost for saving in c), len(c))):
        steps = [config]
        for saving in chosen:
            steps.append(saving.apply(steps[-1]))
        if all(before != after for before, after in pairwise(steps)):
            yield " ".join(saving.flags for saving in chosen), steps[-1]
