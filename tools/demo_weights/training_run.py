"""A training run of fixed length: warm-up and cosine, averaged weights, and checkpoints to resume from."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn
from tqdm import tqdm

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TrainingRun(Generic[ModuleT]):
    """Trains a module for `steps` steps; the same call again resumes from the last checkpoint.

    Args:
        module: what is trained, all of its parameters.
        checkpoint: file that holds weights, averages, optimizer and the step.
        steps: how many, over all resumed calls.
        learning_rate: the peak; the rate rises over `warmup` steps and falls to zero with a cosine.
        decay: False keeps the rate at its peak after the warm-up, so that a run can be extended.
        ema_decay: decay of the averaged copy `self.average`.
        save_every: seconds between checkpoints.
    """

    def __init__(
        self,
        module: ModuleT,
        checkpoint: Path,
        steps: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        ema_decay: float = 0.999,
        warmup: int = 200,
        save_every: float = 60.0,
        decay: bool = True,
    ) -> None:
        self.module, self.checkpoint, self.steps = module, checkpoint, steps
        self.learning_rate, self.ema_decay, self.warmup, self.save_every = learning_rate, ema_decay, warmup, save_every
        self.decay = decay
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.step = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the previous one in place."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "module": self.module.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def fit(self, loss_of: Callable[..., tuple[torch.Tensor, dict[str, float]]], parts: int = 1) -> None:
        """Train to the last step.

        Args:
            loss_of: gives, for a step's number, the loss to minimise and numbers to show; with several parts it also
                gets the part's number, and gives that part's share of the sum.
            parts: number of parts of a step, one thread each.
        """
        first_step, last_save = self.step, time.monotonic()
        with tqdm(total=self.steps, initial=self.step, unit="step", mininterval=5.0) as bar:
            while self.step < self.steps:
                rate = self.learning_rate * min(1.0, (self.step + 1) / self.warmup)
                if self.decay:
                    rate *= 0.5 * (1.0 + math.cos(math.pi * self.step / self.steps))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                if parts == 1:
                    loss, figures = loss_of(self.step)
                    loss.backward()
                else:
                    figures = self._backward_in_parts(loss_of, parts)
                nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self._update_average()
                self.step += 1
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix({key: f"{value:.4f}" for key, value in figures.items()})
                if time.monotonic() - last_save > self.save_every:
                    self.save()
                    last_save = time.monotonic()
        if self.step > first_step:
            self.save()

    def _backward_in_parts(
        self, loss_of: Callable[..., tuple[torch.Tensor, dict[str, float]]], parts: int
    ) -> dict[str, float]:
        """Gradients of all parts, summed in their order, and the figures of the first."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

        def part(number: int) -> tuple[Sequence[torch.Tensor | None], dict[str, float]]:
            loss, figures = loss_of(self.step, number)
            return torch.autograd.grad(loss, parameters, allow_unused=True), figures

        with ThreadPoolExecutor(parts) as pool:
            results = list(pool.map(part, range(parts)))
        for parameter, *gradients in zip(parameters, *(gradients for gradients, _ in results), strict=True):
            found = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = torch.stack(found).sum(0) if found else None
        return results[0][1]

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        averaged, current = tuple(self.average.parameters()), tuple(self.module.parameters())
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
