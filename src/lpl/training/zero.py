"""DeepSpeed's ZeRO, stages 1 and 2: each process steps its part of the weights in float32, in the backward pass.

DeepSpeed's own checkpoints are pickles, and of one number of processes; ours are read out of it instead, parameter by
parameter, by the means that it offers for that, and are those of every other engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from lpl.config import TrainConfig
from lpl.errors import TrainingStoppedError, UserError

FIELDS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, apart from its count of steps."""


def check_zero(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuses what does not go with DeepSpeed, and tells it what the run's options say.

    Raises:
        UserError: stage 3, offloading, or options of the run that do not go with it.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    settings, run, optim = accelerator.state.deepspeed_plugin.deepspeed_config, config.run, config.optim
    zero = settings.get("zero_optimization", {})
    offloads = [key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device") == "cpu"]
    for wrong, name, instead in (
        (zero.get("stage") not in (1, 2), f"zero_stage {zero.get('stage')}", "use 1 or 2, or FSDP2 (preset fsdp2)"),
        (bool(offloads), " and ".join(offloads), "set their device to none"),
    ):
        if wrong:
            raise UserError(f"accelerate's configuration has {name}, which lpl train does not take: {instead}")
    for flag, given in (
        (f"--optimizer {optim.optimizer_name}", optim.optimizer_name != "adamw"),
        ("--use_ema", optim.use_ema),
        ("--compile_denoiser", run.compile_denoiser),
        ("--on_nonfinite skip", run.on_nonfinite == "skip"),
        ("--mixed_precision fp16", accelerator.mixed_precision == "fp16"),
    ):
        if given:
            raise UserError(f"{flag} does not go with DeepSpeed: drop it, or use DDP or FSDP2")
    settings["train_micro_batch_size_per_gpu"] = run.train_batch_size
    settings["gradient_accumulation_steps"] = run.gradient_accumulation_steps
    settings["gradient_clipping"] = optim.max_grad_norm
    settings["zero_allow_untested_optimizer"] = True
    settings.pop("train_batch_size", None)


def is_zero(tensor: Tensor) -> bool:
    """Whether a parameter's float32 weights are DeepSpeed's to keep."""
    return hasattr(tensor, "_hp_mapping")


def whole_weights(parameter: Tensor) -> Tensor:
    """Its weights in float32; collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).detach()


def put_weights(parameter: Tensor, value: Tensor) -> None:
    """Sets them, the same in every process."""
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


class ZeroOptimizer:
    """DeepSpeed's AdamW with the state of one that is whole.

    Args:
        wrapper: what accelerate has prepared.
        groups: the parameters of each group, as the optimizer was made with them.
    """

    def __init__(self, wrapper: Any, groups: list[list[Tensor]]) -> None:
        self._zero = wrapper.optimizer
        self.optimizer = self._zero.optimizer
        self._groups = groups
        self.group_sizes = [len(group) for group in groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups whose rates the step reads."""
        return self.optimizer.param_groups

    def step(self) -> None:
        """Nothing: the backward pass has stepped."""

    def zero_grad(self) -> None:
        """Nothing: the backward pass has freed the gradients."""

    def train(self) -> None:
        """Nothing: it is no schedule-free optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW has it, on the CPU; collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state: dict[int, dict[str, Tensor]] = {}
        groups, steps = [], self._steps()
        for group, parameters in zip(self.param_groups, self._groups, strict=True):
            numbers = range(len(state), len(state) + len(parameters))
            for number, parameter in zip(numbers, parameters, strict=True):
                fields = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in FIELDS}
                state[number] = fields | {"step": torch.tensor(steps)}
            groups.append({k: v for k, v in group.items() if k != "params"} | {"params": list(numbers)})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a whole AdamW's state, the same in every process."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._link()
        parameters = [parameter for group in self._groups for parameter in group]
        for number, fields in state["state"].items():
            for name in FIELDS:
                value = fields[name].to(parameters[number].device, torch.float32)
                safe_set_full_optimizer_state(parameters[number], value, name)
        steps = max((float(fields["step"]) for fields in state["state"].values()), default=0.0)
        for own in self.optimizer.state.values():
            own["step"] = torch.full_like(torch.as_tensor(own["step"]), steps)
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}

    def _link(self) -> None:
        """Makes the state where no step has, and tells every parameter where its part lies.

        DeepSpeed does so in the first step of the first group, when the others have no state yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat, group in zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True):
            empty = {name: torch.zeros_like(flat) for name in FIELDS} | {"step": torch.tensor(0.0)}
            self.optimizer.state[flat] = empty | self.optimizer.state.get(flat, {})
            lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)

    def _steps(self) -> float:
        return max((float(own["step"]) for own in self.optimizer.state.values()), default=0.0)


class ZeroBackward:
    """The backward pass, in which DeepSpeed clips and steps; as FusedBackward, but for how the norm is found.

    Args:
        accelerator: the engine.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __call__(self, backward: Callable[[Tensor], None], loss: Tensor, step: int) -> Tensor:
        """Differentiates a loss that is finite in every process, and at the end of an optimizer step steps.

        Raises:
            TrainingStoppedError: the norm of the gradient is not finite; the weights may be spoilt.
        """
        backward(loss)
        if not self._accelerator.sync_gradients:
            return loss.detach()
        norm = torch.as_tensor(self._accelerator.clip_grad_norm_([], 0.0) or 0.0, dtype=torch.float32)
        if not bool(torch.isfinite(norm)):
            raise TrainingStoppedError(
                f"the gradient was not finite at step {step}, though the loss was, and DeepSpeed has put it into the "
                "weights already, so they are not saved"
            )
        return norm
