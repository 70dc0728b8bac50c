"""LPL at a share of the step's cost: which gated samples are decoded and how deep, with the full gradient on average.

A gated sample lies in the bin b of its noise/signal. It has one random number u, uniform in [0, 1); its term of tap l
is computed where u < r_bl and divided by r_bl:

    E_u[ sum_l 1[u < r_bl] / r_bl * w_l d_l ] = sum_l w_l d_l,    r_bl = min(1, t_b s_l), s_0 >= s_1 >= ... > 0

so the loss and its gradient are the full ones on average, whatever t and s are, as long as they do not depend on u. Per
sample LPL costs sum_b P_b sum_l k_l r_bl on average, P_b being the probability of a gated sample in bin b and k_l what
tap l costs over tap l - 1. With G_l the gradient of the terms from tap l on, the mean squared gradient is

    sum_b P_b sum_l c_bl / r_bl,    c_bl = E[|G_l|^2 - |G_l+1|^2]

which at a given cost is least where r_bl is proportional to sqrt(c_bl / k_l): t_b to the root of the mean squared
gradient in bin b, which is measured; s_l to sqrt(c_l / k_l), for which c_l is taken to fall by FALL from tap to tap
(benchmarks/random_depth.py measures that) and k_l is counted.

Source: importance sampling and Russian roulette; the estimator is this package's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lpl.base.arguments import shape_of
from lpl.base.counter import StepCounter
from lpl.perceptual.auto_weight import MEASURED_SAMPLES
from lpl.perceptual.loss import LPLOutput

logger = logging.getLogger(__name__)

FALL = 0.4
"""About c_(l+1) / c_l with norms channel and own, for a decoder of SDXL's shape and for the demo's."""
BINS = 20
"""Half octaves of noise/signal, from 2^-6 to 2^4; values outside belong to the first or the last bin."""
LOWEST = -6
ROUNDED = 64
"""t_b is a multiple of 1 / 64, so that it does not depend on the order of sums, and at least 1 / 64."""
MEASURED_RATE = 0.5
"""The least probability with which gated samples are decoded while gradients are measured."""


def bins_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The bin of each sample, int64, from the coefficients of noisy latents, of any shape."""
    return (2 * (torch.log2(sigma / alpha) - LOWEST)).nan_to_num(0.0, 1e3, -1e3).floor().clamp(0, BINS - 1).long()


def depth_profile(costs: Sequence[float], squares: Sequence[float] | None = None) -> list[float]:
    """s_l for costs k_l, falling from 1: sqrt(c_l / k_l); neighbours that would rise share sqrt(sum c / sum k).

    Args:
        squares: c_l, 0 or more, the first above 0; None: FALL^l.
    """
    pools: list[tuple[float, float, int]] = []
    for square, cost in zip(squares or [FALL**tap for tap in range(len(costs))], costs, strict=True):
        pool = (square, cost, 1)
        while pools and pools[-1][0] * pool[1] <= pool[0] * pools[-1][1]:
            pooled, before, size = pools.pop()
            pool = (pooled + pool[0], before + pool[1], size + pool[2])
        pools.append(pool)
    top = pools[0][0] / pools[0][1]
    return [(square / cost / top) ** 0.5 for square, cost, size in pools for _ in range(size)]


class Spread(NamedTuple):
    """Which gated samples are decoded, and how deep; tensors on the CPU."""

    bins: Tensor
    """(G,), of every gated sample."""
    decoded: Tensor
    """(D,), which of these are decoded."""
    depths: list[int]
    """Of the decoded ones: how many taps are compared."""
    reach: Tensor
    """(D, taps), the probabilities by which their terms are divided."""

    def first(self, count: int) -> Spread:
        """The same with only the first `count` decoded samples."""
        return Spread(self.bins, self.decoded[:count], self.depths[:count], self.reach[:count])


class Budget:
    """Decides how likely each tap of a gated sample is computed, so that LPL costs a share of the step on average.

    Until the gradients of 256 decoded samples are measured, gated samples are decoded to the end, with one probability
    for all: the budget's, or 0.5 if that is larger. Then t_b is set once, and belongs in the checkpoint. Where the
    whole loss costs no more than the share, every sample is decoded.

    Args:
        share: LPL's mean cost as a share of step_cost, above 0.
        step_cost: cost of a sample's training step without LPL, in the unit of costs (FLOPs, say).
        costs: k_l, one per tap.
        p_gate: probability that a sample passes the gate.

    Raises:
        ValueError: a share or a cost that is not positive.

    Attributes:
        fixed: whether the reach is set for good.
        measured: number of decoded samples that were measured.
    """

    STATE: ClassVar = {"fixed": bool, "measured": int, "sums": list | None, "reach": list}
    """Keys of state_dict() and what they hold."""

    def __init__(self, share: float, step_cost: float, costs: Sequence[float], p_gate: float) -> None:
        for name, value in (("lpl_budget", share), ("step_flops", step_cost), *(("a tap's cost", k) for k in costs)):
            if not isinstance(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        self.share, self.step_cost, self.p_gate = float(share), float(step_cost), float(p_gate)
        self.costs = torch.tensor(costs, dtype=torch.float64)
        self.profile = torch.tensor(depth_profile(costs), dtype=torch.float64)
        rate = self._allowed / float(self.costs.sum())
        self.fixed = rate >= 1
        self.rate = 1.0 if self.fixed else max(MEASURED_RATE, _round_down(rate))
        """r_bl of all bins and taps while gradients are measured."""
        self._table = torch.full((BINS, len(costs)), self.rate, dtype=torch.float64)
        self.measured = 0
        self._sums: Tensor | None = None
        self._step_sums: Tensor | None = None
        self._step_samples = 0
        """Decoded samples of the step under way, as counted on the host."""
        self._warned = False

    @property
    def _allowed(self) -> float:
        """Mean cost that a gated sample may have."""
        return self.share * self.step_cost / self.p_gate

    def spread(self, alpha: Tensor, sigma: Tensor, draws: Tensor, measuring: bool) -> Spread:
        """Decides for gated samples.

        Args:
            alpha, sigma: (G,), the coefficients of their noisy latents.
            draws: (G,), uniform in [0, 1), independent of the noise levels.
            measuring: decode to the end, with one probability for all, as measuring squared gradients needs.
        """
        bins = bins_of(alpha, sigma)
        reach = torch.full_like(self._table, self.rate)[bins] if measuring or not self.fixed else self._table[bins]
        reached = draws[:, None].double() < reach
        decoded = reached[:, 0].nonzero().flatten()
        return Spread(bins, decoded, reached[decoded].sum(1).tolist(), reach[decoded])

    def cost_of(self, spread: Spread) -> float:
        """What these samples cost, in training steps of a sample without LPL."""
        return float(self.costs.cumsum(0)[[depth - 1 for depth in spread.depths]].sum()) / self.step_cost

    def mean_cost(self) -> float:
        """LPL's mean cost as a share of the step; once the reach is fixed, over the bins of the measured samples."""
        if self._sums is None or not self.fixed:
            return float(self._table[0] @ self.costs) * self.p_gate / self.step_cost
        shares = self._sums[1].cpu().double()
        return float(shares @ (self._table @ self.costs) / shares.sum()) * self.p_gate / self.step_cost

    def measure(self, spread: Spread, squares: Tensor) -> None:
        """Adds one micro-batch to what is measured.

        Args:
            squares: (D,), the decoded samples' squared gradients: of the terms after the division, times the
                probability of being decoded.
        """
        if self.fixed:
            return
        if self._step_samples >= MEASURED_SAMPLES and not self._warned:
            self._warned = True
            logger.warning(
                "lpl_budget has measured %d decoded samples since objective.end_step(), which belongs after each "
                "optimizer step: until it is called LPL costs more than the budget", self._step_samples,
            )  # fmt: skip
        self._step_samples += len(spread.decoded)
        bins = spread.bins[spread.decoded]
        counts = torch.stack([torch.bincount(found, minlength=BINS) for found in (spread.bins, bins)])
        found = torch.zeros(BINS, device=squares.device)
        found.index_add_(0, bins.to(squares.device, non_blocking=True), squares.detach().float())
        rows = torch.cat([found[None], counts.to(found, non_blocking=True)])
        self._step_sums = rows if self._step_sums is None else self._step_sums + rows

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Takes over what the finished optimizer step measured; `reduce` sums a tensor over processes."""
        sums, samples = self._step_sums, self._step_samples
        self.discard_step()
        if self.fixed or sums is None:
            return
        if reduce is not None:
            sums = reduce(sums)
            samples = int(sums[2].sum())
        self._sums = sums if self._sums is None else self._sums.to(sums) + sums
        self.measured += samples
        if self.measured >= MEASURED_SAMPLES:
            self._fix()

    def discard_step(self) -> None:
        """Forgets what the optimizer step under way has measured, where that step is skipped."""
        self._step_sums, self._step_samples = None, 0

    def _fix(self) -> None:
        assert self._sums is not None
        squares, counts, numbers = self._sums.cpu().double()
        roots = (squares / counts.clamp(min=1)).sqrt()
        known = (numbers > 0).nonzero().flatten()
        if not known.numel() or not roots[known].max() > 0 or not roots.isfinite().all():
            logger.warning("LPL's budget measured gradients of 0 or none: it measures again from the start")
            self._sums, self.measured = None, 0
            return
        nearest = (torch.arange(BINS)[:, None] - known).abs().argmin(1)  # a bin without samples is like the next one
        roots = roots[known][nearest] / roots[known].max()
        shares, low, high = counts / counts.sum(), 0.0, 1e9
        for _ in range(80):
            middle = (low * high) ** 0.5 if low else high / 2
            cost = float(shares @ (self._reach_of(middle * roots) @ self.costs))
            low, high = (middle, high) if cost <= self._allowed else (low, middle)
        self._table, self.fixed = self._reach_of(low * roots), True
        logger.info(
            "LPL's budget is set: %.3g of a step on average, a share of %.3g of gated samples is decoded",
            self.mean_cost(), float(shares @ self._table[:, 0]),
        )  # fmt: skip

    def _reach_of(self, levels: Tensor) -> Tensor:
        """r_bl for t_b, (BINS, taps)."""
        rounded = (levels * ROUNDED).floor().clamp(min=1) / ROUNDED
        return (rounded[:, None] * self.profile).clamp(max=1)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"fixed": self.fixed, "measured": self.measured, "sums": sums, "reach": self._table.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict gave: a dict of STATE.

        Raises:
            ValueError: the state is of another number of taps.
        """
        self.fixed, self.measured = bool(state["fixed"]), int(state["measured"])
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float32)
        table = torch.tensor(state["reach"], dtype=torch.float64)
        if table.shape != self._table.shape:
            raise ValueError(
                f"the state of lpl_budget is of {len(table[0])} taps, the loss compares {len(self.costs)}: build "
                "it alike"
            )
        self._table = table


def compare_spread(
    loss_fn: Any, pred: Tensor, target: Tensor, mask: Tensor | None, windows: Tensor | None, spread: Spread
) -> LPLOutput:
    """The loss of the decoded samples, each to its depth, each term divided by the probability of reaching it.

    Args:
        loss_fn: a LatentPerceptualLoss.
        pred, target, mask, windows: of the decoded samples, as the loss takes them.
        spread: from Budget.spread.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for sample, (depth, reach) in enumerate(zip(spread.depths, spread.reach.tolist(), strict=True)):
        groups.setdefault(tuple(reach[:depth]), []).append(sample)
    outs = []
    for reach, samples in groups.items():
        at = torch.tensor(samples)
        on = at.to(pred.device, non_blocking=True)
        parts = (pred[on], target[on], None if mask is None else mask[on])
        outs.append(loss_fn(*parts, reach=reach, windows=None if windows is None else windows[at]))
    places = torch.tensor([sample for samples in groups.values() for sample in samples])
    order = places.argsort().to(pred.device, non_blocking=True)

    def by_tap(name: str) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for out in outs:
            for tap, value in getattr(out, name).items():
                found.setdefault(tap, []).append(value)
        return {tap: torch.cat(values) for tap, values in found.items()}

    gradients = [out.gradient for out in outs if out.gradient is not None]
    return LPLOutput(
        torch.cat([out.per_sample for out in outs])[order],
        by_tap("per_layer"),
        by_tap("outlier_fraction"),
        by_tap("feature_mean"),
        by_tap("feature_std"),
        torch.cat(gradients)[order] if gradients else None,
    )


def tap_flops(loss_fn: Any, shape: Sequence[int]) -> list[float]:
    """FLOPs of a sample's loss and gradient from each tap's predecessor to it; counted without computing.

    Args:
        loss_fn: a LatentPerceptualLoss.
        shape: of one sample's latents, (C, *space).
    """
    shape = shape_of("shape", shape)
    meta, latents = loss_fn.on_meta(), torch.empty(1, *shape, device="meta", requires_grad=True)
    windows = None if meta.crop is None else torch.zeros(1, 2)
    totals = [0.0]
    for depth in range(1, len(meta.taps) + 1):
        with StepCounter() as counter:
            meta(latents, latents.detach(), reach=(1.0,) * depth, windows=windows)
        totals.append(float(counter.flops))
    return [b - a for a, b in pairwise(totals)]


def _round_down(rate: float) -> float:
    return max(1, math.floor(rate * ROUNDED)) / ROUNDED
