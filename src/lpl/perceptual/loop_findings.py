"""What lpl.check measured, as numbers with a suggestion and warnings, and as a table.

The suggested gate is the upper edge of the last noise level up to which, at every level, LPL's distance is less than
INFORMED of that of an estimate that knows nothing, and the cosine of both gradients is above 0, each judged by its 95 %
interval over samples. The weight is that of auto_weight.py, from the measured samples:

    weight = share / (1 - share) * sqrt(sum |w_i g_diffusion|^2 / sum |w_i f_i g_lpl|^2)

with w_i the samples' own weights, and f_i = gate_i scale_i / p_gate (for lpl_reduction "gated": times B / gated samples
instead of 1 / p_gate).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lpl.base.terminal import columns, percent
from lpl.perceptual.auto_weight import weight_of_share
from lpl.perceptual.defaults import HIGH_SHARE, LOW_SHARE, TARGET_SHARE
from lpl.perceptual.effect import INFORMED, LEAST, Gradients, Weight, interval, mean_interval, ratio_interval, resampled
from lpl.perceptual.objective import PerceptualObjective
from lpl.perceptual.term import gradient_share

LEVELS = (0.0, 0.1, 0.3, 1.0, 3.0, 6.0, math.inf)
"""Edges of noise/signal between which samples are grouped."""
DEVIATIONS = 4
"""Standard deviations between p_gate and the share that passed beyond which chance does not explain the difference."""


class Measured:
    """Measured values of N samples, float64, on the CPU, joined over batches."""

    def __init__(self, objective: PerceptualObjective) -> None:
        self.objective = objective
        self._parts: dict[str, list[Tensor]] = {}
        self.taps: list[str] = []

    def add(self, **values: Tensor) -> None:
        """Adds a batch's values, (B,) or (layers, B) each."""
        for name, value in values.items():
            self._parts.setdefault(name, []).append(value.detach().cpu().double())

    def add_gradients(self, whole: Gradients, layers: list[Gradients]) -> None:
        """Adds a batch's gradients: of LPL, and of each layer's term."""
        self.add(**whole._asdict())
        if layers:
            self.add(layer_square=torch.stack([g.lpl_square for g in layers]))
            self.add(layer_cosine=torch.stack([g.cosine for g in layers]))

    def joined(self, name: str) -> Tensor:
        """(N,), or (layers, N)."""
        return torch.cat(self._parts[name], -1)

    def has(self, name: str) -> bool:
        """Whether it was measured."""
        return name in self._parts


def numbers_of(found: Measured, decoder: dict[str, Any], seed: int) -> dict[str, Any]:
    """What lpl.check returns; `decoder`: the findings on the VAE's decoder."""
    objective = found.objective
    passes = found.joined("passes").bool()
    level = found.joined("sigma") / found.joined("alpha")
    count, passed = len(level), int(passes.sum())
    auto = objective.auto is not None and not objective.auto.fixed
    levels = _levels(found, level, passes, seed)
    numbers: dict[str, Any] = {
        "num_samples": count,
        "gate": str(objective.gate),
        "p_gate": objective.p_gate,
        "passed": passed / count,
        "levels": levels,
        "layers": _layers(found, passes),
        "share": None if auto or not passed else _share(found, float(objective.weight)),
        "lpl_weight": None if auto else float(objective.weight),
        "suggestion": _suggestion(found, levels, passes, objective, seed),
        **decoder,
    }
    numbers["warnings"] = _warnings(numbers, found, passes, seed)
    return numbers


def _levels(found: Measured, level: Tensor, passes: Tensor, seed: int) -> list[dict[str, Any]]:
    rows = []
    for low, high in pairwise(LEVELS):
        chosen = (level >= low) & (level < high)
        if not chosen.any():
            continue
        values = {n: found.joined(n)[chosen] for n in ("lpl", "uninformed", "lpl_square", "diffusion_square", "cosine")}
        enough = int(chosen.sum()) >= LEAST
        lpl, diffusion = float(values["lpl_square"].mean()), float(values["diffusion_square"].mean())
        informed = ratio_interval(values["lpl"], values["uninformed"], seed) if enough else None
        cosine = mean_interval(values["cosine"], seed) if enough else None
        rows.append(
            {
                "low": low,
                "high": high if high < math.inf else None,
                "num": int(chosen.sum()),
                "passed": float(passes[chosen].cpu().double().mean()),
                "lpl": float(values["lpl"].mean()),
                "uninformed": float(values["lpl"].mean() / values["uninformed"].mean()),
                "uninformed_interval": None if informed is None else list(informed[1:]),
                "ratio": (lpl / diffusion) ** 0.5 if diffusion else None,
                "cosine": float(values["cosine"].mean()),
                "cosine_interval": None if cosine is None else list(cosine[1:]),
            }
        )
    return rows


def _range(row: dict[str, Any]) -> str:
    return f"above {row['low']:g}" if row["high"] is None else f"{row['low']:g} to {row['high']:g}"


def _layers(found: Measured, passes: Tensor) -> list[dict[str, Any]]:
    """Each layer's part, over the samples that pass the gate; over all samples where none does."""
    if not found.has("layer_square"):
        return []
    chosen = passes if passes.any() else torch.ones_like(passes)
    whole = float(found.joined("lpl_square")[chosen].mean()) ** 0.5
    per_layer = (
        found.joined(name)[:, chosen].mean(1).tolist() for name in ("layer_square", "layer_cosine", "outliers")
    )
    return [
        {
            "tap": tap,
            "length": square**0.5 / whole if whole else math.nan,
            "cosine": cosine,
            "outlier_fraction": outliers,
        }
        for tap, square, cosine, outliers in zip(found.taps, *per_layer, strict=True)
    ]


def _squares(found: Measured, passes: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's squared gradient of LPL at weight 1, with reduction and gate, and of the diffusion loss."""
    own = found.joined("own").square()
    lpl = torch.where(passes, found.joined("lpl_square") * found.joined("factor").square(), 0)
    return lpl * own, found.joined("diffusion_square") * own


def _share(found: Measured, weight: float) -> float:
    lpl, diffusion = (float(square.mean()) for square in _squares(found, found.joined("passes").bool()))
    return gradient_share(weight**2 * lpl, diffusion)


def _suggestion(
    found: Measured, levels: list[dict[str, Any]], passes: Tensor, objective: PerceptualObjective, seed: int
) -> dict[str, Any]:
    threshold, why = None, "no noise level has samples enough"
    for row in levels:
        informed, cosine = row["uninformed_interval"], row["cosine_interval"]
        where = f"for noise/signal {_range(row)}"
        if informed is None:
            why = f"{where} there are fewer than {LEAST} samples"
        elif not informed[1] < INFORMED:
            why = (
                f"{where} the estimate's distance is {row['uninformed']:.2f} (95 % up to {informed[1]:.2f}) of that of "
                f"one that knows nothing; below {INFORMED} is asked for"
            )
        elif not cosine[0] > 0:
            why = f"{where} both losses need not pull the same way: cosine {row['cosine']:.2f}"
        else:
            threshold, why = row["high"], "the estimate is informative and both losses pull the same way"
            continue
        break
    share = TARGET_SHARE if objective.auto is None else objective.auto.target_share
    return {
        "lpl_sigma_threshold": threshold,
        "why": why,
        "share": share,
        "lpl_weight": None if not passes.any() else _weight(*_squares(found, passes), share, seed)._asdict(),
    }


def _weight(lpl: Tensor, diffusion: Tensor, share: float, seed: int) -> Weight:
    value = float(weight_of_share(share, lpl.sum(), diffusion.sum()))
    if len(lpl) < LEAST:
        return Weight(value, math.nan, math.nan, "samples")
    chosen = resampled(len(lpl), seed)
    bounds = interval(weight_of_share(share, lpl[chosen].sum(1), diffusion[chosen].sum(1)))
    return Weight(value, *bounds, "samples")


def _warnings(numbers: dict[str, Any], found: Measured, passes: Tensor, seed: int) -> list[str]:
    lines, count, p = [], numbers["num_samples"], numbers["p_gate"]
    acts = found.objective.auto is None and found.objective.lpl_reduction == "expected"
    if acts and abs(numbers["passed"] - p) > DEVIATIONS * (p * (1 - p) / count) ** 0.5:
        lines.append(
            f"{percent(numbers['passed'])} of the samples passed the gate, where p_gate says {percent(p)}: pass "
            "p_gate= of your draws, a Distribution or a function that draws as your loop does"
        )
    if not passes.any():
        lines.append(f"LPL will idle: no sample passed the gate {numbers['gate']}")
    share = numbers["share"]
    if share is not None and not LOW_SHARE <= share <= HIGH_SHARE:
        what = "idle: it gets" if share < LOW_SHARE else "dominate: it gets"
        lines.append(f"LPL will {what} {percent(share)} of the gradient with lpl_weight {numbers['lpl_weight']:.3g}")
    least = numbers["levels"][0]
    if least["uninformed"] > INFORMED:
        lines.append(
            f"even where noise is least the estimate's distance is {least['uninformed']:.2f} of that of one that knows "
            "nothing of the sample: check that model, decoder, latent space and prediction_type belong together, or "
            "train the model first"
        )
    if int(passes.sum()) >= LEAST:
        cosine, _, high = mean_interval(found.joined("cosine")[passes], seed)
        if high < 0:
            lines.append(f"LPL pulls against the diffusion loss within the gate: cosine {cosine:.2f}; narrow the gate")
    lines += [
        f"the decoder is not finite in {dtype}: keep it in another precision"
        for dtype, entry in numbers.get("precision", {}).items()
        if entry["finite"] is False
    ]
    return lines + [note for note in [numbers.get("walk_note")] if note]


def table_of(numbers: dict[str, Any]) -> str:
    """Tables and lines for the terminal."""
    lines = [
        f"gate         {numbers['gate']}: {percent(numbers['passed'])} of {numbers['num_samples']} samples passed, "
        f"p_gate is {percent(numbers['p_gate'])}",
        "",
    ]
    rows = [["noise/signal", "samples", "passed", "LPL", "of uninformed", "ratio", "cosine"]]
    for row in numbers["levels"]:
        spread = row["cosine_interval"]
        between = "" if spread is None else f" ({spread[0]:.2f} to {spread[1]:.2f})"
        rows.append(
            [_range(row), f"{row['num']}", percent(row["passed"]), f"{row['lpl']:.3g}",
             f"{row['uninformed']:.2f}", "" if row["ratio"] is None else f"{row['ratio']:.3g}",
             f"{row['cosine']:.2f}{between}"]
        )  # fmt: skip
    lines += columns(rows, right=True)
    if numbers["layers"]:
        rows = [["layer", "length", "cosine", "outliers"]]
        for row in numbers["layers"]:
            outliers = percent(row["outlier_fraction"])
            rows.append([row["tap"], f"{row['length']:.2f}", f"{row['cosine']:.2f}", outliers])
        lines += ["", *columns(rows, right=True)]
    lines += [
        "",
        "LPL's gradient at the model's output against the diffusion loss's: ratio of lengths at weight 1, cosine (95 %",
        "interval); of a layer's term its length against LPL's",
    ]
    for dtype, entry in numbers.get("precision", {}).items():
        finite = {True: f"finite, to {entry['max_abs'] or 0:.3g}", False: "NOT FINITE", None: "not here"}[
            entry["finite"]
        ]
        lines.append(f"{'precision' if dtype == 'float32' else '':13}{dtype}: {finite}")
    if numbers.get("walk_equals_decode") is not None:
        lines.append(f"walk         {numbers['walk_equals_decode']:.2g} at most between LPL's decoder and decode")
    if numbers["share"] is not None:
        lines.append(
            f"share        {percent(numbers['share'])} of the gradient with lpl_weight {numbers['lpl_weight']:.3g}"
        )
    own = numbers["suggestion"]
    gate = own["lpl_sigma_threshold"]
    lines.append(
        f"suggestion   {'the gate stays' if gate is None else f'lpl_sigma_threshold={gate:g} at most'}: {own['why']}"
    )
    if own["lpl_weight"] is not None:
        weight = Weight(**own["lpl_weight"])
        lines.append(f"             lpl_weight={weight} with this gate: {percent(own['share'])} of the gradient")
    return "\n".join([*lines, *(f"warning      {line}" for line in numbers["warnings"])])
