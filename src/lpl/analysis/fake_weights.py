"""Weights that exist on a fake CPU, where autocast acts, and take no memory."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors in the place of a module's parameters and buffers, of their shapes and dtypes.

    Fake tensors refuse module.to(): what they are to be is settled before, on the meta device.
    """
    for part in module.modules():
        for name, t in [*part._parameters.items(), *part._buffers.items()]:
            if t is not None:
                with mode:
                    fake = torch.empty(t.shape, dtype=t.dtype)
                    setattr(part, name, nn.Parameter(fake, t.requires_grad) if name in part._parameters else fake)
