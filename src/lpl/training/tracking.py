"""What is logged: means over every micro-batch and process since the last log, without synchronising in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from lpl.perceptual.objective import gradient_share

logger = logging.getLogger("lpl")

LOW_SHARE, HIGH_SHARE = 0.01, 0.60
SHARE_SAMPLES = 32
"""Gated samples before the gradient share is judged."""


class MetricWindow:
    """Sums of metrics on the device; read once per log."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, float]] = {}

    def add(self, metrics: Mapping[str, Tensor | float], num_lpl_samples: int) -> None:
        """Adds one micro-batch; what describes gated samples counts by their number, the rest once."""
        for name, value in metrics.items():
            of_samples = name.startswith(("lpl/features", "lpl/snr_mean")) or name == "lpl/loss"
            weight = float(num_lpl_samples) if of_samples else 1.0
            value = value.detach() if isinstance(value, Tensor) else float(value)
            total, count = self._sums.get(name, (None, 0.0))
            if name.endswith("_min"):
                total = value if total is None else torch.minimum(total, value)  # type: ignore[arg-type]
            elif name.endswith("_max"):
                total = value if total is None else torch.maximum(total, value)  # type: ignore[arg-type]
            else:
                total = value * weight if total is None else total + value * weight
            self._sums[name] = (total, count + weight)

    def read(self) -> dict[str, float]:
        """Means (or minima, maxima) over all processes; empties the window. Synchronises."""
        mine = [{name: (float(total), count) for name, (total, count) in self._sums.items()}]
        self._sums = {}
        merged: dict[str, list[tuple[float, float]]] = {}
        for part in gather_object(mine):
            for name, pair in part.items():
                merged.setdefault(name, []).append(pair)
        return {name: _merge(name, pairs) for name, pairs in merged.items()}


def _merge(name: str, pairs: list[tuple[float, float]]) -> float:
    values = [value for value, _ in pairs]
    if name.endswith("_min"):
        return min(values)
    if name.endswith("_max"):
        return max(values)
    return sum(values) / sum(count for _, count in pairs)


class Tracker:
    """Turns windows into logged metrics, and warns once where LPL idles or dominates."""

    def __init__(
        self, accelerator: Accelerator, samples_per_step: int, weight_option: str, judged_from: int = 0
    ) -> None:
        self.judged_from = judged_from  # steps before this one, in which LPL's weight still rises, are not judged
        self.accelerator, self.samples_per_step, self.weight_option = accelerator, samples_per_step, weight_option
        self.window = MetricWindow()
        self._squares, self._gated, self._warned = [0.0, 0.0], 0.0, False
        self._time, self._step = time.perf_counter(), 0

    def start(self, step: int) -> None:
        """Starts the clock at an optimizer step."""
        self._time, self._step = time.perf_counter(), step

    def pause(self, seconds: float) -> None:
        """Takes time that was no training (validation, checkpoints) out of the samples per second."""
        self._time += seconds

    def log(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Logs everything since the last log under diffusers' names; returns it."""
        metrics = self.window.read()
        done = step - self._step
        lpl_square, diffusion_square = (
            metrics.pop("lpl/gradient_square", 0.0),
            metrics.pop("diffusion/gradient_square", 0.0),
        )
        weighted = metrics.get("lpl/weighted_loss", 0.0)
        if "lpl/weight" in metrics:
            metrics["lpl/gradient_share"] = gradient_share(lpl_square, diffusion_square)
            metrics["lpl/loss_share"] = weighted / (weighted + metrics["diffusion_loss"] or 1.0)
            if self._step >= self.judged_from:
                self._judge(lpl_square, diffusion_square, done, metrics)
        now = time.perf_counter()
        metrics["train_loss"] = metrics["diffusion_loss"] + weighted
        metrics["samples_per_second"] = done * self.samples_per_step / (now - self._time)
        self._time, self._step = now, step
        if self.accelerator.device.type == "cuda":
            metrics["lpl/memory/allocated"] = torch.cuda.memory_allocated() / 2**20
            metrics["lpl/memory/reserved"] = torch.cuda.memory_reserved() / 2**20
        metrics |= extra
        self.accelerator.log(metrics, step=step)
        return metrics

    def _judge(self, lpl_square: float, diffusion_square: float, steps: int, metrics: dict[str, float]) -> None:
        self._squares[0] += lpl_square * steps
        self._squares[1] += diffusion_square * steps
        self._gated += metrics["lpl/application_ratio"] * self.samples_per_step * steps
        share = gradient_share(*self._squares)
        if (
            self._warned
            or self._gated < SHARE_SAMPLES
            or metrics["lpl/weight"] == 0
            or LOW_SHARE <= share <= HIGH_SHARE
        ):
            return
        self._warned = True
        does, change = ("idles", "raise") if share < LOW_SHARE else ("dominates", "lower")
        logger.warning(
            "LPL %s: it has %.3g %% of the gradient at the denoiser's output (%s); %s --lpl_weight or use auto",
            does, 100 * share, self.weight_option, change,
        )  # fmt: skip


class BadBatch(NamedTuple):
    """The first micro-batch whose loss was not finite."""

    micro_step: int
    samples: list[int]
    """Its samples whose diffusion loss was not finite."""
    lpl: bool
    """Whether LPL was not."""


class FiniteGuard:
    """Remembers on the device what was first not finite; looked at when metrics are logged, so nothing synchronises."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._culprits: Tensor | None = None
        self._gradient: Tensor | None = None

    def watch(self, micro_step: int, diffusion_per_sample: Tensor, lpl: Tensor) -> None:
        """Notes micro-batch `micro_step` if a sample's diffusion loss (B,), or LPL, is not finite."""
        bad = ~torch.isfinite(torch.cat([diffusion_per_sample, lpl.reshape(1)]))
        if self._first is None or self._culprits is None:
            self._first = torch.full((), -1, device=bad.device, dtype=torch.long)
            self._culprits = torch.zeros_like(bad)
        fresh = (self._first < 0) & bad.any()
        self._culprits = torch.where(fresh, bad, self._culprits)
        self._first = torch.where(fresh, micro_step, self._first)

    def watch_gradient(self, step: int, norm: Tensor) -> None:
        """Notes an optimizer step whose gradient norm is not finite."""
        if self._gradient is None:
            self._gradient = torch.full((), -1, device=norm.device, dtype=torch.long)
        self._gradient = torch.where((self._gradient < 0) & ~torch.isfinite(norm), step, self._gradient)

    def first(self) -> BadBatch | None:
        """The first bad micro-batch, or None."""
        if self._first is None or self._culprits is None or int(self._first) < 0:
            return None
        *samples, lpl = self._culprits.tolist()
        return BadBatch(int(self._first), [i for i, bad in enumerate(samples) if bad], lpl)

    def first_gradient(self) -> int | None:
        """The first optimizer step with a bad gradient, or None."""
        return None if self._gradient is None or int(self._gradient) < 0 else int(self._gradient)
