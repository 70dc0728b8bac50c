"""--fused_backward_pass: each weight steps in the backward pass, as soon as its gradient is whole, which is then freed.

The hooks are torch's (register_post_accumulate_grad_hook): a gradient is whole once every use of the weight has been
differentiated, so nothing in the rest of the pass reads the weight again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lpl.errors import TrainingStoppedError
from lpl.training.optimizers import bare


class FusedBackward:
    """Makes the backward pass step the weights.

    What differs from a step after it: the norm of the gradient is known only when every weight has moved. So nothing is
    clipped, and a gradient that is not finite although the loss is cannot be left out: it stops the run.

    Args:
        parameters: that are trained.
        optimizer: over them, with a step_one; accelerate's wrapper or not.
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
            backward: accelerate's.
            loss: scalar.
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
