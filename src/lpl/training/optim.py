"""Optimizer, learning-rate schedule and EMA, all from well-kept libraries."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from lpl.config import OptimConfig, TrainConfig
from lpl.errors import UserError

WARMUP_STEPS = 500


def build_optimizer(parameters: list[torch.nn.Parameter], config: OptimConfig, learning_rate: float) -> Any:
    """AdamW, or bitsandbytes' 8-bit AdamW.

    Raises:
        UserError: --use_8bit_adam without bitsandbytes or without a GPU.
    """
    optimizer_class: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError(
                "--use_8bit_adam needs bitsandbytes: pip install 'latent-perceptual-loss[optim]'"
            ) from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


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


def build_ema(parameters: list[torch.nn.Parameter], config: OptimConfig) -> EMAModel | None:
    """An average of the trained parameters on their device, or None without --use_ema."""
    if not config.use_ema:
        return None
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    ema.to(parameters[0].device)
    return ema


def scaled_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """The peak learning rate, after --scale_lr."""
    run = config.run
    factor = run.gradient_accumulation_steps * run.train_batch_size * num_processes if config.optim.scale_lr else 1
    return config.learning_rate * factor
