"""What --weights_dtype bfloat16 and --fused_backward_pass need of the other options; no torch here."""

from __future__ import annotations

import importlib.util
import os

from lpl.config import TrainConfig, require
from lpl.config.optim import ONE_BY_ONE
from lpl.errors import UserError
from lpl.training.launch import check_launch, processes

NEEDS = f"{', '.join(ONE_BY_ONE)} or an optimizer of optimi (--optimizer optimi.AdamW)"
REASONS = {
    "prodigy": "it estimates its step size from all parameters at once",
    "schedulefree_adamw": "it keeps two sets of weights and moves each by differences that bfloat16 loses",
}


def check_small_cards(config: TrainConfig, packages: bool = True) -> None:
    """Checks the options for small cards against the others.

    Args:
        config: the options.
        packages: whether those that they need must be installed here.

    Raises:
        UserError: the first that does not go with them, or a package that is missing.
    """
    optim, run = config.optim, config.run
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
        _check_optimizer(config, flag)
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
        _check_optimizer(config, flag)
    _check_package("optimi", f"--optimizer {optim.optimizer_name}", packages and optim.is_optimi)
    check_processes(config, processes())


def check_processes(config: TrainConfig, number: int) -> None:
    """Refuses what works in one process only.

    Raises:
        UserError: there are several.
    """
    optim = config.optim
    require(
        not (optim.fused_backward_pass and number > 1),
        f"--fused_backward_pass in {number} processes: a gradient is gone before it is averaged over them; drop it",
    )
    require(
        optim.weights_dtype == "float32" or number == 1,
        f"--weights_dtype bfloat16 in {number} processes: each would round at random for itself, and their weights "
        "would drift apart (with optimi, this is untried); use float32",
    )


def _check_optimizer(config: TrainConfig, flag: str) -> None:
    name = config.optim.optimizer_name
    reason = REASONS.get(name, "it is not known to step parameter by parameter and to keep small updates")
    require(name in ONE_BY_ONE or config.optim.is_optimi, f"{flag} with --optimizer {name}: {reason}; choose {NEEDS}")


def _check_package(package: str, flag: str, needed: bool) -> None:
    require(
        not needed or importlib.util.find_spec(package) is not None,
        f"{flag} needs {package}: pip install 'latent-perceptual-loss[optim]'",
    )


def suits(config: TrainConfig) -> bool:
    """Whether the options for small cards go with the others and with the launch, wherever the run is to be."""
    try:
        check_small_cards(config, packages=False)
        check_launch(config)
    except UserError:
        return False
    return True
