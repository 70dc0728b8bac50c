"""A training run with a budget of minutes: learning rate from the time spent, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn
from tqdm import tqdm

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TimedRun(Generic[ModuleT]):
    """Trains a module until its budget of minutes is spent; the same call again resumes from the last checkpoint.

    Args:
        module: what is trained, all of its parameters.
        checkpoint: file that holds weights, averages, optimizer and the seconds spent.
        minutes: the budget, over all resumed calls.
        learning_rate: its peak; it rises over `warmup` steps and falls to zero with a cosine of the time spent.
        ema_decay: of the averaged copy `self.average`.
        save_every: seconds between checkpoints.
    """

    def __init__(
        self,
        module: ModuleT,
        checkpoint: Path,
        minutes: float,
        learning_rate: float,
        weight_decay: float = 0.0,
        ema_decay: float = 0.999,
        warmup: int = 200,
        save_every: float = 60.0,
    ) -> None:
        self.module, self.checkpoint, self.budget = module, checkpoint, 60.0 * minutes
        self.learning_rate, self.ema_decay, self.warmup, self.save_every = learning_rate, ema_decay, warmup, save_every
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.step, self.spent = 0, 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state["spent"]

    @property
    def is_spent(self) -> bool:
        """Whether nothing of the budget is left."""
        return self.spent >= self.budget

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
                "spent": self.spent,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def fit(self, loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]]) -> None:
        """Train until the budget is spent.

        Args:
            loss_of: gives, for a step's number, the loss to minimise and figures to show.
        """
        bar = tqdm(total=round(self.budget), initial=round(self.spent), unit="s", mininterval=5.0)
        first_step, last_save = self.step, time.monotonic()
        while not self.is_spent:
            start = time.monotonic()
            rate = self.learning_rate * min(1.0, (self.step + 1) / self.warmup)
            rate *= 0.5 * (1.0 + math.cos(math.pi * self.spent / self.budget))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, figures = loss_of(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._update_average()
            self.step += 1
            now = time.monotonic()
            bar.update(round(self.spent + now - start) - round(self.spent))
            self.spent += now - start
            if self.step % 20 == 0:
                bar.set_postfix({"step": self.step, **{key: f"{value:.4f}" for key, value in figures.items()}})
            if now - last_save > self.save_every:
                self.save()
                last_save = now
        bar.close()
        if self.step > first_step:
            self.save()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        averaged, current = tuple(self.average.parameters()), tuple(self.module.parameters())
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
