"""The weights of a run as they are used: raw, averaged, and which of them are the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lpl.training.ema import Average
from lpl.training.optimizers import averages_itself, bare
from lpl.training.sharded import local


class Weights:
    """Puts one kind of weights in the place of those in training, and those back again, bit for bit.

    "raw" is what the optimizer means to be used: the weights in training or, of a schedule-free optimizer, the average
    that it keeps of them (Defazio et al., arXiv 2405.15682: x, where gradients are taken at y). "ema" is the average
    that --use_ema keeps.

    Args:
        parameters: the trained parameters by name.
        optimizer: over them, accelerate's wrapper or not.
        ema: their average, or None.
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
        """These weights for a while. Those in training wait on the CPU: way and back are no rounding."""
        if kind == "raw" and not averages_itself(self.optimizer):
            yield
            return
        kept = [local(p).detach().to("cpu", copy=True) for p in self.parameters.values()]
        self.put(kind)
        try:
            yield
        finally:
            if averages_itself(self.optimizer):
                self.optimizer.train()  # leads back up to rounding only
            with torch.no_grad():
                for p, value in zip(self.parameters.values(), kept, strict=True):
                    local(p).copy_(value)
