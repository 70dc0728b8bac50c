"""What a run logs: means over the steps since the last log, LPL's share of the gradient, and what LPL did in all."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from lpl.base.errors import TrainingStoppedError
from lpl.base.terminal import percent
from lpl.perceptual.auto_weight import zero_gradient
from lpl.perceptual.defaults import HIGH_SHARE, LOW_SHARE
from lpl.perceptual.objective import PerceptualObjective
from lpl.perceptual.term import gradient_share

logger = logging.getLogger("lpl")


@dataclass
class LPLTotals:
    """Sums over the steps in which LPL was computed; they belong in the checkpoint.

    Attributes:
        steps: optimizer steps with LPL.
        samples: samples in them.
        gated: samples of these that passed the gate.
        measured: steps of which the gradients below were measured.
        lpl_square, diffusion_square: mean squared gradients at the model's output, summed over those steps.
        since: counting begins after this step; 0 unless --lpl_start or a checkpoint without sums delays it.
    """

    steps: float = 0.0
    samples: float = 0.0
    gated: float = 0.0
    measured: float = 0.0
    lpl_square: float = 0.0
    diffusion_square: float = 0.0
    since: int = 0

    def add(self, metrics: Mapping[str, float], step: int, steps: float, samples_per_step: int) -> None:
        """Adds what was logged at a step.

        Args:
            metrics: means over the steps since the last log that had LPL.
            steps: how many those are.
        """
        if not self.steps:
            self.since = step - round(steps)
        self.steps += steps
        self.samples += steps * samples_per_step
        self.gated += metrics["lpl/application_ratio"] * steps * samples_per_step
        if "diffusion/gradient_square" in metrics:
            self.measured += steps
            self.lpl_square += metrics["lpl/gradient_square"] * steps
            self.diffusion_square += metrics["diffusion/gradient_square"] * steps

    def line(self, objective: PerceptualObjective, steps: int) -> str | None:
        """One sentence on what LPL did in a run of so many steps, or why nothing; None: nothing is known of it.

        The share is that of the root mean square gradients over all steps with LPL, defined as for a single step.
        """
        nothing = "LPL acted on no sample: "
        if objective.lpl_start >= steps:
            return f"{nothing}--lpl_start {objective.lpl_start} is not reached in {steps} steps; start earlier"
        if not self.steps:
            return None
        if objective.auto is None and float(objective.weight) == 0:
            return f"{nothing}--lpl_weight is 0; give a number above 0, or auto"
        if not self.gated:
            return (
                f"{nothing}none of {self.samples:,.0f} passed the gate {objective.gate}, though "
                f"{objective.p_gate:.2%} do on average; give a wider gate, or train longer"
            )
        if self.measured and not self.lpl_square:
            if objective.auto is not None:
                return f"{nothing}the run ended before --lpl_weight auto had a weight; train longer, or give a number"
            return f"{nothing}its gradient was 0 for all that passed the gate; look at masks and sample weights"
        since = f" since step {self.since}" if self.since else ""
        reached = f"{percent(self.gated / self.samples)} of the samples{since}"
        weight = f"weight {float(objective.weight_at(steps - 1)):.3g}"
        if not self.measured:
            return f"LPL acted on {reached}, {weight}; its share of the gradient was not measured"
        share = gradient_share(self.lpl_square, self.diffusion_square)
        return f"LPL had {percent(share)} of the gradient on {reached}, {weight}"


def shown(metrics: Mapping[str, float], totals: LPLTotals) -> str:
    """What the progress bar says of a step's metrics: the loss, and LPL's value and share of the gradient."""
    loss = f"loss {metrics['train_loss']:.3g}"
    if "lpl/weight" not in metrics:
        return loss
    if not totals.gated:
        return f"{loss}, LPL: no sample passed yet"
    if not metrics["lpl/application_ratio"]:
        return f"{loss}, LPL: no sample passed lately"
    if not metrics["lpl/weight"]:
        return f"{loss}, LPL without a weight yet"
    return f"{loss}, LPL {metrics['lpl/weighted_loss']:.3g} with a share of {percent(metrics['lpl/gradient_share'])}"


SHARE_SAMPLES = 32
"""Gated samples before the gradient share is judged."""


class MetricWindow:
    """Sums of metrics on the device; read once per log."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, float]] = {}
        self.counts: dict[str, float] = {}
        """Of the last read: what each metric was divided by."""

    def add(self, metrics: Mapping[str, Tensor | float], num_lpl_samples: int) -> None:
        """Adds one micro-batch; metrics of gated samples are weighted by their number, others by 1."""
        for name, value in metrics.items():
            of_samples = name.startswith(("lpl/features", "lpl/snr_mean")) or name == "lpl/loss"
            weight = float(num_lpl_samples) if of_samples else 1.0
            if name == "lpl/loss" and "lpl/cost" in metrics:  # under --lpl_budget it stands for all gated samples
                weight = float(metrics["lpl/num_samples"])
            if not weight:  # a mean over no samples
                continue
            value = value.detach() if isinstance(value, Tensor) else float(value)
            total, count = self._sums.get(name, (None, 0.0))
            value = value if name.endswith(("_min", "_max")) else value * weight
            self._sums[name] = (_together(name, total, value), count + weight)

    def state_dict(self) -> dict[str, list[Any]]:
        """What this process has added since the last read, for a checkpoint. Synchronises."""
        kind = lambda total: str(total.dtype).removeprefix("torch.") if isinstance(total, Tensor) else None  # noqa: E731
        return {name: [float(total), count, kind(total)] for name, (total, count) in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Any]], device: torch.device) -> None:
        """Adds what state_dict gave, bit for bit if nothing was here."""
        for name, (number, count, kind) in state.items():
            value = number if kind is None else torch.tensor(number, dtype=getattr(torch, kind), device=device)
            total, before = self._sums.get(name, (None, 0.0))
            self._sums[name] = (_together(name, total, value), before + count)

    def __len__(self) -> int:
        """How many metrics have been added to."""
        return len(self._sums)

    def read(self) -> dict[str, float]:
        """Means (or minima, maxima) over all processes; empties the window. Synchronises."""
        mine = [{name: (float(total), count) for name, (total, count) in self._sums.items()}]
        self._sums = {}
        merged: dict[str, list[tuple[float, float]]] = {}
        for part in gather_object(mine):
            for name, pair in part.items():
                merged.setdefault(name, []).append(pair)
        self.counts = {name: sum(count for _, count in pairs) for name, pairs in merged.items()}
        return {name: _merge(name, pairs) for name, pairs in merged.items()}


def _together(name: str, total: Tensor | float | None, value: Tensor | float) -> Tensor | float:
    if total is None:
        return value
    if name.endswith("_min"):
        return torch.minimum(total, value)  # type: ignore[arg-type]
    if name.endswith("_max"):
        return torch.maximum(total, value)  # type: ignore[arg-type]
    return total + value


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
        self.window, self.totals = MetricWindow(), LPLTotals()
        self._squares, self._gated, self._warned = [0.0, 0.0], 0.0, False
        self._time, self._timed_from = time.perf_counter(), 0
        self._step: int | None = None

    def start(self, step: int) -> None:
        """Starts the clock at an optimizer step."""
        self._time, self._timed_from = time.perf_counter(), step
        self._step = step if self._step is None else self._step

    def state_dict(self) -> dict[str, Any]:
        """What is not logged yet, by process, and what the warning about the share is based on; all must call it."""
        return {
            "windows": gather_object([self.window.state_dict()]),
            "logged_at": self._step or 0,
            "squares": list(self._squares),
            "gated": self._gated,
            "warned": self._warned,
            "lpl": asdict(self.totals),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what state_dict gave; windows of more processes than there are now are shared among these."""
        accelerator = self.accelerator
        for window in state["windows"][accelerator.process_index :: accelerator.num_processes]:
            self.window.load_state_dict(window, accelerator.device)
        self._step, self._squares = int(state["logged_at"]), list(state["squares"])
        self._gated, self._warned = float(state["gated"]), bool(state["warned"])
        self.totals = LPLTotals(**state.get("lpl", {}))

    def pause(self, seconds: float) -> None:
        """Takes time that was no training (validation, checkpoints) out of the samples per second."""
        self._time += seconds

    def log(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Logs everything since the last log under diffusers' names; returns it.

        Raises:
            TrainingStoppedError: LPL's gradient was exactly 0 in all of these steps, in every process.
        """
        metrics = self.window.read()
        fault = zero_gradient(metrics)
        for name in ("lpl/samples_with_loss", "lpl/samples_without_gradient"):
            metrics.pop(name, None)
        done = step - (self._step or 0)
        if "lpl/weight" in metrics:
            with_lpl = self.window.counts["lpl/weight"] / self.window.counts["diffusion_loss"]
            self.totals.add(metrics, step, done * with_lpl, self.samples_per_step)
        lpl_square, diffusion_square = (
            metrics.pop("lpl/gradient_square", 0.0),
            metrics.pop("diffusion/gradient_square", 0.0),
        )
        weighted = metrics.get("lpl/weighted_loss", 0.0)
        if "lpl/weight" in metrics:
            metrics["lpl/gradient_share"] = gradient_share(lpl_square, diffusion_square)
            metrics["lpl/loss_share"] = weighted / (weighted + metrics["diffusion_loss"] or 1.0)
            if (self._step or 0) >= self.judged_from:
                self._judge(lpl_square, diffusion_square, done, metrics)
        now = time.perf_counter()
        metrics["train_loss"] = metrics["diffusion_loss"] + weighted
        metrics["samples_per_second"] = (step - self._timed_from) * self.samples_per_step / (now - self._time)
        self._time, self._step, self._timed_from = now, step, step
        if self.accelerator.device.type == "cuda":
            metrics["lpl/memory/allocated"] = torch.cuda.memory_allocated() / 2**20
            metrics["lpl/memory/reserved"] = torch.cuda.memory_reserved() / 2**20
        metrics |= extra
        self.accelerator.log(metrics, step=step)
        if fault is not None:
            raise TrainingStoppedError(f"step {step}: {fault} ({self.weight_option})")
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
