"""A value whose gradient is known already."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class WithGradient(torch.autograd.Function):
    """values (B,) with dvalues_i/dx_i = gradient_i for x and gradient (B, C, h, w): one opaque operation for autograd.

    Nothing but the gradient is kept for the backward pass. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output.view(-1, *[1] * (gradient.dim() - 1)) * gradient, None, None
