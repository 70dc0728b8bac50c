"""A gradient of exactly 0: LPL is computed, logged, and trains nothing.

It is what features give that are detached from the prediction, and what a half-precision decoder gives whose gradients
underflow. Nothing else of a run shows it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lpl.perceptual.input_checks import given
from lpl.perceptual.loss import LPLOutput


def gradient_of(out: Any, pred: Tensor, needed: bool) -> Tensor | None:
    """d per_sample / d pred of what a loss returned, like pred, detached; None without gradients.

    Args:
        out: an LPLOutput.
        pred: what it was computed from, (B, C, ...).
        needed: differentiate where the loss states no gradient.

    Raises:
        ValueError: no (B,) values.
        RuntimeError: values that do not depend on pred, as their graph says.
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
    """How many samples have a value that counts, and how many of these a gradient of exactly 0, as metrics.

    Args:
        per_sample, coefficient: (B,), values and what they are multiplied by.
        gradient: (B, ...), each value's own.
        mask: (B, 1, ...), where values count.
    """
    counts = (per_sample.detach().abs() > 0) & (coefficient.detach() != 0)
    if mask is not None:
        counts = counts & mask.ne(0).flatten(1).any(1)
    without = counts & ~gradient.ne(0).flatten(1).any(1)
    return {"lpl/samples_with_loss": counts.sum().float(), "lpl/samples_without_gradient": without.sum().float()}


def zero_gradient(metrics: Mapping[str, float]) -> str | None:
    """What is wrong where every sample with a value that counts has a gradient of exactly 0; None: nothing.

    Args:
        metrics: count_zero_gradients' of one micro-batch, or their sums or means over several and over processes.
    """
    expected = metrics.get("lpl/samples_with_loss", 0.0)
    if not expected or metrics["lpl/samples_without_gradient"] < expected:
        return None
    return (
        "LPL's gradient at the model's output is exactly 0 for every gated sample, though its value is not: it trains "
        "nothing; look for features that are detached or computed without gradients, or a half-precision decoder whose "
        "gradients underflow"
    )
