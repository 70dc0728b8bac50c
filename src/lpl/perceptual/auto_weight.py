"""The weight "auto", set by LPL's share of the gradient, and a check for gradients of exactly 0.

A gradient of exactly 0 means that LPL is computed and logged, but trains nothing. It comes from features that are
detached from the prediction, or from a half-precision decoder whose gradients underflow. Nothing else in a run shows
it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lpl.base.arguments import function
from lpl.perceptual.input_checks import given
from lpl.perceptual.loss import LPLOutput

logger = logging.getLogger(__name__)


def gradient_of(out: Any, pred: Tensor, needed: bool) -> Tensor | None:
    """d per_sample / d pred of a loss's output, shaped like pred, detached; None where gradients are off.

    Args:
        out: an LPLOutput.
        pred: what it was computed from, (B, C, ...).
        needed: differentiate where out.gradient is None.

    Raises:
        ValueError: out has no per_sample (B,).
        RuntimeError: per_sample has no graph, so it does not depend on pred.
    """
    values = out.per_sample if isinstance(out, LPLOutput) else None
    if not isinstance(values, Tensor) or values.shape != (len(pred),):
        found = given(out) if values is None else f"per_sample: {given(values)}"
        raise ValueError(f"loss_fn returned {found}; it must return an LPLOutput with per_sample ({len(pred)},)")
    if not (torch.is_grad_enabled() and pred.requires_grad):
        return None
    if not values.requires_grad:
        raise RuntimeError("loss_fn returned values without graph: its features of the prediction are detached")
    if out.gradient is not None or not needed:
        return out.gradient
    (gradient,) = torch.autograd.grad(values.sum(), pred, retain_graph=True, allow_unused=True)
    return torch.zeros_like(pred) if gradient is None else gradient


def count_zero_gradients(
    per_sample: Tensor, gradient: Tensor, coefficient: Tensor, mask: Tensor | None
) -> dict[str, Tensor | float]:
    """Metrics: how many samples have a value that counts, and how many of these have a gradient of exactly 0.

    Args:
        per_sample, coefficient: (B,), values and the factors they are multiplied by.
        gradient: (B, ...), of each value.
        mask: (B, 1, ...), where values count.
    """
    counts = (per_sample.detach().abs() > 0) & (coefficient.detach() != 0)
    if mask is not None:
        counts = counts & mask.ne(0).flatten(1).any(1)
    without = counts & ~gradient.ne(0).flatten(1).any(1)
    return {"lpl/samples_with_loss": counts.sum().float(), "lpl/samples_without_gradient": without.sum().float()}


def zero_gradient(metrics: Mapping[str, float]) -> str | None:
    """The message where every sample with a value that counts has a gradient of exactly 0; else None.

    Args:
        metrics: from count_zero_gradients, of one micro-batch, or sums or means over several micro-batches and
            processes.
    """
    expected = metrics.get("lpl/samples_with_loss", 0.0)
    if not expected or metrics["lpl/samples_without_gradient"] < expected:
        return None
    return (
        "LPL's gradient at the model's output is exactly 0 for every gated sample, though its value is not: it trains "
        "nothing; look for features that are detached or computed without gradients, or a half-precision decoder whose "
        "gradients underflow"
    )


MEASURED_SAMPLES = 256
"""Gated samples after which the weight is fixed."""


def weight_of_share(target_share: float, lpl_square: Tensor, diffusion_square: Tensor) -> Tensor:
    """share / (1 - share) * sqrt(diffusion_square / lpl_square), of any shape: the weight that gives LPL this share.

    Args:
        target_share: in (0, 1).
        lpl_square, diffusion_square: mean (or summed) squared gradients at the model's output, LPL's at weight 1; the
            weight is 0 where LPL's is 0.
    """
    odds = target_share / (1 - target_share)
    return torch.where(lpl_square > 0, odds * (diffusion_square / lpl_square).sqrt(), 0.0)


class AutoWeight:
    """The weight at which LPL has a target share of the gradient at the denoiser's output.

    With r = sqrt(mean over all samples of |d(term)/d(model_output)|^2), reduction included, and the share
    r_lpl / (r_lpl + r_diffusion):    weight = share / (1 - share) * r_diffusion / r_lpl(weight 1).

    Measured over the first 256 gated samples of the run. Until then the weight of an optimizer step is the estimate
    from the steps before it (0 before the first gated sample); after that it is fixed and belongs in the checkpoint.

    A weight of 0 is never fixed: LPL would be off for the whole run. The measurement begins anew, with a warning.

    Args:
        target_share: in (0, 1).
    """

    STATE: ClassVar = {"weight": Real, "fixed": bool, "measured": int, "squares": list | None}
    """Keys of state_dict() and what they hold."""

    def __init__(self, target_share: float) -> None:
        self.target_share = target_share
        self.weight: Tensor | float = 0.0
        self.fixed = False
        self.measured = 0
        self._squares: Tensor | None = None
        self._step_squares: Tensor | None = None
        self._step_samples = 0
        self._step: int | None = None
        self._warned = False

    def measure(self, lpl_square: Tensor, diffusion_square: Tensor, gated: int, step: int | None = None) -> None:
        """Adds one micro-batch.

        Args:
            lpl_square, diffusion_square: squared gradients at the model's output of LPL at weight 1 and of the
                diffusion loss, for each sample of its own loss, summed over the micro-batch.
            gated: its gated samples.
            step: the optimizer step, if the caller knows it.

        Raises:
            RuntimeError: end_step() was never called.
        """
        if self.fixed:
            return
        if self._step_samples >= MEASURED_SAMPLES:
            self._expect_end_step(step)
        self._step = step if self._step_squares is None else self._step
        pair = torch.stack([lpl_square, diffusion_square]).float().detach()
        self._step_squares = pair if self._step_squares is None else self._step_squares + pair
        self._step_samples += gated

    def _expect_end_step(self, step: int | None) -> None:
        """Reports a missing end_step(): the step has measured enough. Many micro-batches may be one step."""
        needed = "lpl_weight 'auto' needs objective.end_step() after each optimizer step"
        if step != self._step or self._step_samples >= 64 * MEASURED_SAMPLES:
            raise RuntimeError(f"{needed}: it has measured {self._step_samples} gated samples since the last")
        if step is None and not self._warned:
            self._warned = True
            logger.warning(
                "%s: it has measured %d gated samples since the last, and until then the weight stays %g (one step of "
                "more samples than these is fine)", needed, self._step_samples, float(self.weight),
            )  # fmt: skip

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Takes over what the finished optimizer step measured.

        Args:
            reduce: sums a tensor over processes; needed where there are several.
        """
        if reduce is not None:
            function("reduce", reduce, "x")
        if self.fixed or self._step_squares is None:
            return
        squares, samples = self._step_squares, self._step_samples
        if reduce is not None:
            summed = reduce(torch.cat([squares, squares.new_tensor([samples])]))
            squares, samples = summed[:2], int(summed[2])
        self._squares = squares if self._squares is None else self._squares.to(squares) + squares
        self.measured += samples
        self._step_squares, self._step_samples = None, 0
        lpl, diffusion = self._squares.unbind()
        self.weight = weight_of_share(self.target_share, lpl, diffusion).float()
        if self.measured < MEASURED_SAMPLES:
            return
        self.weight = float(self.weight)
        self.fixed = 0 < self.weight < math.inf
        if not self.fixed:
            logger.warning(
                "lpl_weight 'auto' measured %d gated samples and found a weight of %g: the gradient of LPL (%g) or of "
                "the diffusion loss (%g) is 0 or not finite, as where all sample_weights are 0; it measures anew",
                self.measured, self.weight, float(lpl.sqrt()), float(diffusion.sqrt()),
            )  # fmt: skip
            self.weight, self.measured, self._squares = 0.0, 0, None

    def discard_step(self) -> None:
        """Forgets what the optimizer step under way has measured; call it instead of end_step() for a skipped step."""
        self._step_squares, self._step_samples = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {
            "weight": float(self.weight),
            "fixed": self.fixed,
            "measured": self.measured,
            "squares": None if self._squares is None else self._squares.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict gave: a dict of STATE."""
        self.fixed, self.measured = bool(state["fixed"]), int(state["measured"])
        self.weight = float(state["weight"])
        squares = state["squares"]
        self._squares = None if squares is None else torch.tensor(squares, dtype=torch.float32)
