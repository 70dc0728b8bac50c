"""What is trained: denoiser, optimizer and the moving average of the weights, and which weights are used for what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from lpl.base.terminal import progress
from lpl.config import OptimConfig, TrainConfig
from lpl.families.base import Family
from lpl.training.engine import add_lora
from lpl.training.offloaded import offload_to_host
from lpl.training.optimizers import (
    averages_itself,
    build_optimizer,
    build_schedule,
    scaled_learning_rate,
    split_components,
)
from lpl.training.per_parameter import FusedBackward, bare
from lpl.training.quantized import quantize
from lpl.training.sharded import WholeModel, local


class Average(EMAModel):
    """shadow <- decay * shadow + (1 - decay) * parameters, after every optimizer step or every N.

    With t = updates - ema_update_after_step - 1, the decay is (1 + t)/(10 + t), or with ema_warmup
    1 - (1 + t/ema_inv_gamma)^-ema_power; not above ema_decay, not below ema_min_decay, and 0 while t <= 0. It is the
    decay of an update, whatever ema_update_every.

    Args:
        parameters: what is averaged; the parts that this process holds are copied to the device of the average, as
            float32 whatever they are.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimConfig) -> None:
        parts = [local(p) for p in parameters]
        super().__init__(
            parts,
            decay=config.ema_decay,
            min_decay=config.ema_min_decay,
            update_after_step=config.ema_update_after_step,
            use_ema_warmup=config.ema_warmup,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            # foreach needs a copy of all parameters in the precision of the average, which is float32: in bfloat16 an
            # average with decay 0.9999 would never move.
            foreach=all(p.dtype == torch.float32 for p in parameters),
        )
        self.shadow_params: list[Tensor] = [shadow.float() for shadow in self.shadow_params]
        self.to("cpu" if config.ema_device == "cpu" else parts[0].device)
        self.every = config.ema_update_every

    def after_step(self, step: int, parameters: Iterable[nn.Parameter]) -> None:
        """Updates the average with the parameters after `step` optimizer steps of the run, if it is time."""
        if step % self.every:
            return
        device = self.shadow_params[0].device
        parts = (local(p) for p in parameters)
        # EMAModel copies what needs no gradient, and averages the rest.
        self.step([p if p.device == device else p.detach().to(device).requires_grad_() for p in parts])

    @torch.no_grad()
    def copy_into(self, parameters: Iterable[Tensor]) -> None:
        """Writes the average into the parameters, one after another: a device never holds it twice."""
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            local(parameter).copy_(shadow)

    def numbers(self) -> dict[str, Any]:
        """The state without its tensors."""
        return {name: value for name, value in self.state_dict().items() if name != "shadow_params"}

    def load(self, numbers: dict[str, Any], shadow: list[Tensor]) -> None:
        """Goes on from another average's state; the options stay those of this one."""
        device = self.shadow_params[0].device
        self.optimization_step = int(numbers["optimization_step"])
        self.shadow_params = [tensor.to(device) for tensor in shadow]


class Weights:
    """Replaces the weights in training by one kind of weights, and puts them back again, bit for bit.

    "raw" is what the optimizer offers for use: the weights in training or, of a schedule-free optimizer, the average
    that it keeps of them (Defazio et al., arXiv 2405.15682: x, where gradients are taken at y). "ema" is the average
    that --use_ema keeps.

    Args:
        choice: --final_weights.
    """

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: Any, ema: Average | None, choice: str) -> None:
        self.parameters, self.optimizer, self.ema = parameters, bare(optimizer), ema
        self.kinds = ("raw",) if ema is None else ("raw", "ema")
        self.final = self.kinds[-1] if choice == "auto" else choice

    def put(self, kind: str) -> None:
        """Puts these weights in place, for good."""
        if kind == "ema":
            assert self.ema is not None
            self.ema.copy_into(self.parameters.values())
        elif averages_itself(self.optimizer):
            self.optimizer.eval()

    @contextmanager
    def use(self, kind: str) -> Iterator[None]:
        """Uses these weights within the block. Those in training wait on the CPU and come back without rounding."""
        if kind == "raw" and not averages_itself(self.optimizer):
            yield
            return
        kept = [local(p).detach().to("cpu", copy=True) for p in self.parameters.values()]
        self.put(kind)
        try:
            yield
        finally:
            if averages_itself(self.optimizer):
                self.optimizer.train()  # goes back only up to rounding
            with torch.no_grad():
                for p, value in zip(self.parameters.values(), kept, strict=True):
                    local(p).copy_(value)


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
        weight_dtype: precision of the run's arithmetic, in which frozen weights are kept.
    """
    denoiser: Any = family.denoiser
    kind = accelerator.distributed_type
    if config.model.rank is not None:
        if weight_dtype != torch.float32:
            denoiser.to(dtype=weight_dtype)
        if config.model.quantize_base is not None:
            show = partial(progress, desc="quantizing", unit="layer", show=accelerator.is_local_main_process)
            quantize(denoiser, config.model.quantize_base, accelerator.device, show)
        add_lora(denoiser, config.model, family.lora_targets, config.run.seed)
    else:
        if config.optim.weights_dtype == "bfloat16":
            denoiser.to(dtype=torch.bfloat16)
        denoiser.requires_grad_(True)
    if config.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    if config.model.offload_blocks is not None:
        offload_to_host(denoiser, config.model.offload_blocks, accelerator.device)
    if kind != DistributedType.FSDP:  # FSDP splits it first
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
    optimizer.train()  # acts on schedule-free optimizers only
    weights = Weights(parameters, optimizer, ema, config.optim.final_weights)
    return Trained(wrapped, parameters, optimizer, schedule, ema, weights, stepping, whole_model)
