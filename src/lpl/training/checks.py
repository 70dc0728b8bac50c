"""Options that cannot act in a run because it is too short, and those that save memory but do not go with others."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator

from lpl.base.errors import UserError, require
from lpl.config import LPLConfig, OptimConfig, TrainConfig, declared
from lpl.config.optim import ONE_BY_ONE
from lpl.config.run import processes
from lpl.training.launch import check_launch

logger = logging.getLogger("lpl")


def warn_of_steps(config: TrainConfig, steps: int) -> None:
    """Warns by name, a line each, of what a run of `steps` optimizer steps never reaches.

    A period that is too long is named only where it was asked for: the defaults are made for long runs. A warm-up is
    always named, because it changes what is trained.
    """
    for line in _never_reached(config, steps):
        logger.warning("%s", line)


def _never_reached(config: TrainConfig, steps: int) -> Iterator[str]:
    yield from _of_rate(config.optim, steps)
    yield from _of_lpl(config.lpl, steps)
    if config.optim.use_ema:
        yield from _of_average(config.optim, steps)
    usual, given = TrainConfig().flat(), config.flat()
    periods = {name: facts.period for name, facts in declared().items() if facts.period is not None}
    if config.logging.draws_images or config.data.holds_out:
        periods["validation_steps"] = "validation happens before the first step and after the last alone"
    for name, what in periods.items():
        if given[name] != usual[name] and given[name] > steps:
            yield f"--{name} {given[name]} is not reached in the run of {steps} steps: {what}; give at most {steps}"


def _of_rate(optim: OptimConfig, steps: int) -> Iterator[str]:
    warmup = optim.warmup_steps
    if warmup >= steps:
        reached = (steps - 1) / warmup
        default = " (the default)" if optim.lr_warmup_steps is None else ""
        yield (
            f"--lr_warmup_steps {warmup}{default}: the run of {steps} steps never leaves the warm-up, and the learning "
            f"rate reaches {reached:.0%} of its peak: give fewer, such as {steps // 10}, or train longer"
        )
    if optim.lr_step_rules is not None:
        *rules, _ = optim.lr_step_rules.split(",")
        late = [rule for rule in rules if int(rule.split(":")[1]) >= steps]
        if late:
            yield (
                f"--lr_step_rules {optim.lr_step_rules}: the run of {steps} steps ends before what follows step "
                f"{late[0].split(':')[1]}: give earlier steps, or train longer"
            )


def _of_lpl(lpl: LPLConfig, steps: int) -> Iterator[str]:
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


def _of_average(optim: OptimConfig, steps: int) -> Iterator[str]:
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


def warn_of_objective(config: TrainConfig) -> None:
    """Says once, by name, what a run does that its options do not show."""
    if not config.model.rescale_betas_zero_snr:
        return
    weighting = config.diffusion.loss_weighting
    if config.diffusion.snr_gamma is not None or weighting != "none":
        name = "--snr_gamma" if weighting == "none" else f"--loss_weighting {weighting}"
        logger.warning(
            "%s gives the last timestep of --rescale_betas_zero_snr, where SNR is 0, the weight 0: it is not learned",
            name,
        )
    if config.model.rank is not None:
        logger.warning(
            "--rescale_betas_zero_snr: a LoRA's file does not hold the schedule; sample with a scheduler that has "
            "rescale_betas_zero_snr and timestep_spacing trailing"
        )


def warn_of_decoder(config: TrainConfig, capability: tuple[int, int]) -> None:
    """Warns if LPL's decoder does not use the tensor cores that a GPU of this compute capability has for float32."""
    lpl = config.lpl
    if lpl.use_lpl and lpl.lpl_dtype == "float32" and not config.run.allow_tf32 and capability >= (8, 0):
        logger.warning(
            "LPL's decoder runs in float32 without tensor cores: --allow_tf32 is faster, on an A100 or H100 several "
            "times; so is --lpl_dtype bfloat16, or auto"
        )


NEEDS = f"{', '.join(ONE_BY_ONE)} or an optimizer of optimi (--optimizer optimi.AdamW)"
REASONS = {
    "prodigy": "it estimates its step size from all parameters at once",
    "schedulefree_adamw": "it keeps two sets of weights and moves each by differences that bfloat16 loses",
}


def check_memory_options(config: TrainConfig, packages: bool = True) -> None:
    """Checks the options that save memory against the others.

    Args:
        packages: whether those that they need must be installed here.

    Raises:
        UserError: the first that does not go with them, or a package that is missing.
    """
    optim, run = config.optim, config.run
    if config.model.offload_blocks is not None:
        flag = f"--offload_blocks {config.model.offload_blocks:g}"
        require(
            config.model.rank is not None,
            f"{flag} without --rank: every weight is trained, and what is trained stays on the device; drop it",
        )
        require(
            run.gradient_checkpointing,
            f"{flag} without --gradient_checkpointing: all copies would be kept for the backward pass; add it",
        )
        require(not run.compile_denoiser, f"{flag} with --compile_denoiser: it cannot use copies; drop one of them")
    precision = run.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if optim.weights_dtype == "bfloat16":
        flag = "--weights_dtype bfloat16"
        require(
            config.model.rank is None,
            f"{flag} with --rank {config.model.rank}: an adapter is small and stays float32, and its base is in "
            "--mixed_precision's precision already; drop --weights_dtype",
        )
        require(
            precision == "bf16", f"{flag} needs --mixed_precision bf16, not {precision}: its arithmetic is bfloat16's"
        )
        _check_optimizer(optim, flag)
        require(
            optim.optimizer_keywords.get("kahan_sum") is not False or not optim.is_optimi,
            f"{flag} with --optimizer_args kahan_sum=False: small updates would round to nothing; drop kahan_sum",
        )
        _check_package("torchao", flag, packages and optim.rounds)
    if optim.fused_backward_pass:
        flag = "--fused_backward_pass"
        require(
            optim.max_grad_norm == 0,
            f"{flag} with --max_grad_norm {optim.max_grad_norm:g}: gradients are freed before the norm of all of them "
            "is known; add --max_grad_norm 0 (adafactor clips each tensor's update by itself)",
        )
        require(
            run.gradient_accumulation_steps == 1,
            f"{flag} with --gradient_accumulation_steps {run.gradient_accumulation_steps}: every backward pass is a "
            "step, nothing accumulates; use 1",
        )
        require(precision != "fp16", f"{flag} with --mixed_precision fp16: its scaler needs all gradients; use bf16")
        _check_optimizer(optim, flag)
    _check_package("optimi", f"--optimizer {optim.optimizer_name}", packages and optim.is_optimi)
    check_processes(optim, processes())


def check_processes(optim: OptimConfig, number: int) -> None:
    """Refuses what works in one process only."""
    require(
        not (optim.fused_backward_pass and number > 1),
        f"--fused_backward_pass in {number} processes: a gradient is gone before it is averaged over them; drop it",
    )
    require(
        optim.weights_dtype == "float32" or number == 1,
        f"--weights_dtype bfloat16 in {number} processes: each would round at random for itself, and their weights "
        "would drift apart (with optimi, this is untried); use float32",
    )


def _check_optimizer(optim: OptimConfig, flag: str) -> None:
    name = optim.optimizer_name
    reason = REASONS.get(name, "it is not known to step parameter by parameter and to keep small updates")
    require(name in ONE_BY_ONE or optim.is_optimi, f"{flag} with --optimizer {name}: {reason}; choose {NEEDS}")


def _check_package(package: str, flag: str, needed: bool) -> None:
    require(
        not needed or importlib.util.find_spec(package) is not None,
        f"{flag} needs {package}: pip install 'latent-perceptual-loss[optim]'",
    )


def suits(config: TrainConfig) -> bool:
    """Whether the options that save memory go with the others and with the launch, wherever the run is to be."""
    try:
        check_memory_options(config, packages=False)
        check_launch(config)
    except UserError:
        return False
    return True
