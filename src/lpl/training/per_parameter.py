"""Optimizers that step parameter by parameter: on bfloat16 weights, or within the backward pass.

A learning rate of 1e-5 moves a weight of 1 by 1e-5, and bfloat16 has no number between 1 and 1.0078: rounded to the
nearest, most updates of a fine-tuning are lost. Here the optimizer steps on a float32 copy of one weight tensor at a
time, so that all of its state is float32, and the result x goes to the neighbour above with probability
(x - below)/(above - below), else to the one below: E[rounded] = x (stochastic rounding; Gupta et al., arXiv
1502.02551, section 2; Zamirai et al., arXiv 2010.06192, for bfloat16 training). The rounding is torchao's.

optimi's optimizers need none of this: they keep what rounding leaves over (Kahan summation) and have a step of one
parameter of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpl.base.errors import TrainingStoppedError, UserError
from lpl.config import OptimConfig

ROUNDED_AT_ONCE = 2**22
"""Values that are rounded at once: torchao writes out five tensors for them."""


class PerParameter(Optimizer):
    """A mixin before an optimizer in which a parameter's step depends on that parameter alone.

    A bfloat16 parameter is stepped in float32 and rounded stochastically, from torch's own random state, which the
    trainer sets from the seed and the step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Steps every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_one(parameter)

    @torch.no_grad()
    def step_one(self, parameter: Tensor) -> None:
        """Steps one parameter by its gradient, which is freed if the parameter is bfloat16."""
        if parameter.dtype != torch.bfloat16:
            self._step_alone(parameter)
            return
        gradient, low = parameter.grad, parameter.data
        assert gradient is not None
        parameter.grad = None
        parameter.data = low.float()
        parameter.grad = gradient.float()
        del gradient
        try:
            self._step_alone(parameter)
        finally:
            stepped = parameter.data
            parameter.grad = None
            parameter.data = low
        rows = max(1, ROUNDED_AT_ONCE // low[0].numel())
        for part, values in zip(low.split(rows), stepped.split(rows), strict=True):
            part.copy_(rounding()(values))

    def _step_alone(self, parameter: Tensor) -> None:
        groups = self.param_groups
        if not hasattr(self, "_places"):
            self._places = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self.param_groups = [groups[self._places[id(parameter)]] | {"params": [parameter]}]
        try:
            super().step()
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state as it is; torch would cast it to the precision of the parameters."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(self.state[parameter][name].device, copy=True)


class Released(PerParameter):
    """A mixin before an optimizer of optimi that was built with gradient_release: uses its step of one parameter."""

    def step_one(self, parameter: Tensor) -> None:
        """Steps one parameter by its gradient."""
        super(PerParameter, self).step(param=parameter)  # type: ignore[call-overload]

    def state_dict(self) -> dict[str, Any]:
        """The state, without the group that optimi keeps with each parameter."""
        state = super().state_dict()
        own = {i: {n: v for n, v in fields.items() if n != "group"} for i, fields in state["state"].items()}
        return state | {"state": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state, and puts the groups back."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["group"] = group


def suited(cls: Any, config: OptimConfig) -> Any:
    """The optimizer's class, with a step of one parameter where the options need it."""
    if config.is_optimi:
        return _mixed(Released, cls) if config.fused_backward_pass else cls
    return _mixed(PerParameter, cls) if config.rounds or config.fused_backward_pass else cls


def of_optimi(config: OptimConfig) -> dict[str, Any]:
    """Keywords of optimi's optimizers that the options decide; otherwise optimi would decide at its first step."""
    keywords: dict[str, Any] = {"kahan_sum": True} if config.weights_dtype == "bfloat16" else {}
    return keywords | ({"gradient_release": True} if config.fused_backward_pass else {})


def _mixed(mixin: type, cls: Any) -> Any:
    # Keeps the name of the class: checkpoints hold it, and either class reads the other's.
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


@cache
def rounding() -> Callable[[Tensor], Tensor]:
    """torchao's stochastic rounding of float32 to bfloat16.

    Raises:
        UserError: torchao is not installed, or too old or too new to have it.
    """
    try:
        return importlib.import_module("torchao.optim.quant_utils")._fp32_to_bf16_sr
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--weights_dtype bfloat16 needs torchao with its stochastic rounding ({error}): "
            "pip install 'latent-perceptual-loss[optim]'"
        ) from error


def bare(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class FusedBackward:
    """Makes the backward pass step the weights.

    Unlike in a step after it, the norm of the gradient is known only when every weight has moved. So nothing is
    clipped, and a step whose gradient is not finite although the loss is cannot be left out: it stops the run.

    Args:
        optimizer: of these parameters, with a step_one; wrapped by accelerate or not.
    """

    def __init__(self, parameters: Iterable[Tensor], optimizer: Any) -> None:
        self._optimizer, self._norms = bare(optimizer), list[Tensor]()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self._optimizer.step_one(parameter)
        parameter.grad = None

    def __call__(self, backward: Callable[[Tensor], None], loss: Tensor, step: int) -> Tensor:
        """Steps every weight by the gradient of a loss that is finite. Synchronises.

        Args:
            step: of the run, counted from 1.

        Returns:
            The norm of the gradient, on its device.

        Raises:
            TrainingStoppedError: the norm is not finite; the weights are spoilt and must not be saved.
        """
        self._norms.clear()
        backward(loss)
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        if not bool(torch.isfinite(norm)):
            raise TrainingStoppedError(
                f"the gradient was not finite at step {step}, though the loss was, and --fused_backward_pass has "
                "put it into the weights already, so they are not saved"
            )
        return norm
