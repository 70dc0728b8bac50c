"""The exponential moving average of the trained parameters: diffusers' EMAModel, on the device or on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from lpl.config import OptimConfig
from lpl.training.sharded import local


class Average(EMAModel):
    """shadow <- decay * shadow + (1 - decay) * parameters, after every optimizer step or every N.

    With t = updates - ema_update_after_step - 1, the decay is (1 + t)/(10 + t), or with ema_warmup
    1 - (1 + t/ema_inv_gamma)^-ema_power; not above ema_decay, not below ema_min_decay, and 0 while t <= 0. It is the
    decay of an update, whatever ema_update_every.

    Args:
        parameters: what is averaged; the parts that this process holds are copied to the device of the average, as
            float32 whatever they are.
        config: the --ema_ options.
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
            # All at once needs a copy of them all in the precision of the average, which is float32's: in bfloat16 an
            # average with decay 0.9999 would never move.
            foreach=all(p.dtype == torch.float32 for p in parameters),
        )
        self.shadow_params: list[Tensor] = [shadow.float() for shadow in self.shadow_params]
        self.to("cpu" if config.ema_device == "cpu" else parts[0].device)
        self.every = config.ema_update_every

    def after_step(self, step: int, parameters: Iterable[nn.Parameter]) -> None:
        """Takes over the parameters as they are after so many optimizer steps of the run."""
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
        """Goes on from another average's state; what the options say stays this one's."""
        device = self.shadow_params[0].device
        self.optimization_step = int(numbers["optimization_step"])
        self.shadow_params = [tensor.to(device) for tensor in shadow]
