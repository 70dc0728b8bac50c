"""The gate and the weight that the measurements suggest, and why.

The gate: the estimate is informative where LPL's distance is less than INFORMED of that of an estimate that knows
nothing (for mse about the share of the features' variance left unexplained), and both losses pull the same way where
the cosine of their gradients is above 0, each judged by its 95 % interval over pictures. The threshold is the end of
the last part of the schedule up to which both hold in every part.

The weight: with p_t how likely a timestep is, w_i the pictures' own weights, and f_t = gate_t scale_t / p_gate,

    weight = share / (1 - share) * sqrt(sum_t p_t |w_i g_diffusion|^2 / sum_t p_t |w_i f_t g_lpl|^2)

as in perceptual/auto_weight.py, which measures the same over a run's first samples; the interval is a bootstrap over
pictures. For --lpl_reduction gated and --lpl_max_samples 1 / p_gate^2 is replaced by its mean over the number of gated
samples in a micro-batch, taken as binomial.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lpl.analysis.check.levels import Levels
from lpl.base.terminal import percent
from lpl.config import TrainConfig
from lpl.perceptual.auto_weight import weight_of_share
from lpl.perceptual.effect import INFORMED, LEAST, Weight, interval, mean_interval, ratio_interval, resampled
from lpl.perceptual.gate import Gate

NO_TIMESTEP = "none of the measured timesteps"


def uninformed_share(found: Levels, k: int, seed: int) -> tuple[float, float, float]:
    """LPL's distance in part k relative to that of an estimate that knows nothing, with its 95 % interval."""
    return ratio_interval(found.lpl[:, k], found.uninformed, seed)


def cosine_interval(found: Levels, k: int, seed: int) -> tuple[float, float, float]:
    """The mean cosine in part k with its 95 % interval."""
    return mean_interval(found.cosine[:, k], seed)


def gate_cosine(found: Levels, gate: Gate, seed: int) -> tuple[float, list[float] | None]:
    """The mean cosine over the samples that pass a gate, and its 95 % interval; None: too few pictures."""
    chance = torch.where(gate.opens(found.levels), _chance(found, gate), 0)
    chance = torch.where(found.cosine.isfinite(), chance, 0)
    pulls = torch.where(chance > 0, found.cosine * chance, 0).sum(1)
    value = float(pulls.sum() / chance.sum())
    if len(pulls) < LEAST:
        return value, None
    chosen = resampled(len(pulls), seed)
    return value, list(interval(pulls[chosen].sum(1) / chance.sum(1)[chosen].sum(1)))


def supported_threshold(found: Levels, seed: int) -> tuple[int, str]:
    """The timestep up to which the measurements support LPL, 0 if nowhere, and the reason why it ends there."""
    if len(found.lpl) < LEAST:
        return 0, f"{len(found.lpl)} pictures are too few, at least {LEAST} are needed"
    for k, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        share, _, most = uninformed_share(found, k, seed)
        cosine, least, _ = cosine_interval(found, k, seed)
        if not most < INFORMED:
            why = (
                f"for t in {low}..{high - 1} the estimate's distance is {share:.2f} (95 % up to {most:.2f}) of that "
                f"of one that knows nothing of the picture; below {INFORMED} is asked for"
            )
            return low, why
        if not least > 0:
            pull = f"cosine {cosine:.2f}, 95 % from {least:.2f}"
            return low, f"for t in {low}..{high - 1} both losses need not pull the same way: {pull}"
    return found.edges[-1], "the estimate is informative and both losses pull the same way over the whole schedule"


def reduction_factor(config: TrainConfig, p_gate: float) -> float:
    """Mean square of a gated sample's factor besides scale and weight: 1 / p_gate^2 for reduction expected."""
    batch, limit, expected = config.run.train_batch_size, config.lpl.lpl_max_samples, config.lpl.lpl_reduction
    total = 0.0
    for others in range(batch):
        chance = math.comb(batch - 1, others) * p_gate**others * (1 - p_gate) ** (batch - 1 - others)
        gated = others + 1
        square = 1 / p_gate**2 if expected == "expected" else (batch / gated) ** 2
        total += chance * square * gated / min(gated, limit or gated)
    return total


def _chance(found: Levels, gate: Gate) -> Tensor:
    """The probability that a drawn level lies in each part, (N, K), estimated from the density at the measured one."""
    return gate.schedule.density(found.levels) * torch.tensor(found.edges).diff()


def _probability(gate: Gate) -> float:
    """The probability of passing a gate, summed over timesteps."""
    levels = gate.schedule.at([t + 0.5 for t in range(gate.num_timesteps)])
    return float(gate.schedule.density(levels)[gate.opens(levels)].sum())


def weight_for(found: Levels, gate: Gate, config: TrainConfig, share: float, seed: int) -> Weight:
    """The weight at which LPL has a share of the gradient, with a gate on the run's schedule."""
    lpl, diffusion = _squares(found, gate, config)
    value = float(weight_of_share(share, lpl.sum(), diffusion.sum()))
    if len(lpl) < LEAST:
        return Weight(value, math.nan, math.nan)
    chosen = resampled(len(lpl), seed)
    return Weight(value, *interval(weight_of_share(share, lpl[chosen].sum(1), diffusion[chosen].sum(1))))


def share_at(found: Levels, gate: Gate, config: TrainConfig, weight: float) -> float:
    """LPL's share of the gradient at the model's output with this weight."""
    lpl, diffusion = (float(square.sum()) ** 0.5 for square in _squares(found, gate, config))
    return weight * lpl / (weight * lpl + diffusion) if weight * lpl > 0 else 0.0


def _squares(found: Levels, gate: Gate, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Each picture's mean squared gradient, of LPL at weight 1 and of the diffusion loss, (N,)."""
    chance, open_ = _chance(found, gate), gate.opens(found.levels)
    p_gate = _probability(gate)
    own = found.weights[:, None].square()
    lpl = torch.where(open_, found.lpl_square, 0) * own * chance * reduction_factor(config, p_gate)
    diffusion = torch.where(chance > 0, found.diffusion_square, 0) * own * chance
    return lpl.sum(1), diffusion.nansum(1)


def suggestion(found: Levels, own_gate: Gate, config: TrainConfig) -> dict[str, Any]:
    """The entry "suggestion" of check.json; own_gate is on the run's schedule."""
    seed, share = config.run.seed, config.lpl.lpl_target_share
    own = weight_for(found, own_gate, config, share, seed)
    passed = found.lpl_square[own_gate.opens(found.levels)]
    if not (passed > 0).any() or passed.isnan().any():
        why, gradient = ("LPL has no gradient where", "zero") if len(passed) else (f"{NO_TIMESTEP} passes", "none")
        if passed.isnan().any():
            why, gradient = f"LPL is not finite with --lpl_dtype {config.lpl.lpl_dtype} where", "not finite"
        return _nothing(own_gate, f"nothing is suggested: {why} {own_gate}", gradient)
    threshold, why = supported_threshold(found, seed)
    below = own_gate if threshold == 0 else Gate(own_gate.schedule, t_threshold=threshold)
    kept = threshold == 0 or _probability(below) == 0
    lines = []
    gate = own_gate if kept else below
    if kept:
        reason = "no timestep below it is drawn" if threshold else f"no threshold is suggested: {why}"
        lines.append(f"{reason}; the gate stays at {own_gate}")
    else:
        lines.append(f"--lpl_t_threshold {threshold}: {why}")
        lines.append(
            f"this is how far LPL says something here, not what trains best: a run's {own_gate} stays within it"
            if int(own_gate.table.nonzero().max()) < threshold
            else f"this run's gate, {own_gate}, goes beyond it"
        )
    weight = own if kept else weight_for(found, gate, config, share, seed)
    p_gate = _probability(gate)
    lines.append(
        f"--lpl_weight {weight}: LPL's share of the gradient is then {share:g} "
        f"(--lpl_target_share) with {gate}, which {percent(p_gate)} of the samples pass; auto measures it by itself"
    )
    if not kept:
        lines.append(f"with this run's gate, {own_gate}, it would be {own}")
    asked = config.lpl.lpl_weight
    own_share = None if asked == "auto" else share_at(found, own_gate, config, float(asked))
    if own_share is not None:
        lines.append(f"this run's --lpl_weight {asked} with {own_gate} gives LPL {own_share:.2g} of the gradient")
    cosine, cosine_range = gate_cosine(found, own_gate, seed)
    share, *bounds = uninformed_share(found, 0, seed)
    return {
        "lpl_t_threshold": None if kept else threshold,
        "lpl_weight": weight.value,
        "lpl_weight_interval": weight.interval,
        "p_gate": p_gate,
        "own_share": own_share,
        "own_gate": {
            "gate": str(own_gate),
            "gradient": "some",
            "lpl_weight": own.value,
            "lpl_weight_interval": own.interval,
            "cosine": cosine,
            "cosine_interval": cosine_range,
        },
        "uninformed": None if len(found.lpl) < LEAST else {"share": share, "interval": bounds},
        "why": lines,
    }


def _nothing(own_gate: Gate, why: str, gradient: str) -> dict[str, Any]:
    empty = {"lpl_weight": None, "lpl_weight_interval": None}
    return {
        "lpl_t_threshold": None,
        **empty,
        "p_gate": _probability(own_gate),
        "own_share": None,
        "own_gate": {"gate": str(own_gate), "gradient": gradient, **empty, "cosine": None, "cosine_interval": None},
        "uninformed": None,
        "why": [why],
    }
