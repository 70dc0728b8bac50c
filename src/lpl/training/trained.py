"""What a run trains: the denoiser as the engine wraps it, its optimizer and schedule, its average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from lpl.config import TrainConfig
from lpl.families.base import Family
from lpl.training.ema import Average
from lpl.training.fused_backward import FusedBackward
from lpl.training.lora import add_lora
from lpl.training.optim import build_optimizer, build_schedule, scaled_learning_rate, split_components
from lpl.training.sharded import WholeModel
from lpl.training.weights import Weights


@dataclass
class Trained:
    """The parts of a run that its steps change.

    Attributes:
        denoiser: as the engine has wrapped it.
        parameters: that are trained, by name, as the engine holds them.
        optimizer: over them, wrapped.
        schedule: of its rates; not prepared by accelerate, which would step it once per process.
        ema: their average, or None.
        weights: which of them are used for what.
        stepping_backward: the backward pass, where that is what steps; None: the optimizer steps after it.
        whole_model: the denoiser as it is saved.
    """

    denoiser: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    schedule: Any
    ema: Average | None
    weights: Weights
    stepping_backward: FusedBackward | None
    whole_model: WholeModel


def build_trained(
    config: TrainConfig, family: Family, accelerator: Accelerator, weight_dtype: torch.dtype, num_steps: int
) -> Trained:
    """Makes the family's denoiser trainable, as the config says, and prepares it for the engine.

    Args:
        config: the run's.
        family: the loaded model.
        accelerator: the engine.
        weight_dtype: precision of the run's arithmetic, in which frozen weights are kept.
        num_steps: optimizer steps of the run.
    """
    denoiser: Any = family.denoiser
    kind = accelerator.distributed_type
    if config.model.rank is not None:
        if weight_dtype != torch.float32:
            denoiser.to(dtype=weight_dtype)
        add_lora(denoiser, config.model, family.lora_targets, config.run.seed)
    else:
        if config.optim.weights_dtype == "bfloat16":
            denoiser.to(dtype=torch.bfloat16)
        denoiser.requires_grad_(True)
    if config.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    if kind != DistributedType.FSDP:  # which splits it before it goes there
        denoiser.to(accelerator.device)
    whole_model = WholeModel(accelerator, denoiser)
    trained = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    own, components = split_components(trained, config, accelerator.num_processes)
    rate = scaled_learning_rate(config, accelerator.num_processes)
    optimizer = build_optimizer(own, config.optim, rate, components)
    schedule = build_schedule(optimizer, config.optim, num_steps)
    if config.run.compile_denoiser:
        denoiser.compile()  # in place: no wrapper that would be seen in the names of parameters
    wrapped, optimizer = accelerator.prepare(denoiser, optimizer)
    parameters = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    ema = Average(list(parameters.values()), config.optim) if config.optim.use_ema else None
    stepping: FusedBackward | None = None
    if config.optim.fused_backward_pass:
        stepping = FusedBackward(parameters.values(), optimizer)
    optimizer.train()  # says something to schedule-free optimizers only
    weights = Weights(parameters, optimizer, ema, config.optim.final_weights)
    return Trained(wrapped, parameters, optimizer, schedule, ema, weights, stepping, whole_model)
