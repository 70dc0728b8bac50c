"""Figures at points of guidance and sampling steps: an arm's own best guidance, and arms against each other there.

A row is a point of a run: arm, seed, guidance, sampling_steps, frechet and further figures. An arm's figure of a seed
is that at the guidance with the least mean Fréchet distance over the arm's *other* seeds (leave one out), so that no
seed chooses for itself. Ratios are paired by seed, with Student's 95 % interval of their mean logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lpl.config.points import as_tuple, edge_of, frechet_of
from lpl.evaluation.intervals import mean, t_interval

Row = dict[str, Any]
Curve = Mapping[Any, Mapping[int, Row]]
"""Rows of an arm at one number of steps, by guidance (None: the pipeline's own) and seed."""
FIGURES = {
    "precision": "precision",
    "recall": "recall",
    "low_band_log_error": "spectrum_log_error_low",
    "middle_band_log_error": "spectrum_log_error_middle",
    "high_band_log_error": "spectrum_log_error_high",
}
"""Figures of a row beside frechet, and the metrics of eval.json that they are."""
SAMPLES = "samples"
"""Kind of the figures of `lpl eval`."""
DIFFERENCES = ("precision", "recall", "high_band_log_error")
"""Figures that are compared by their difference."""


class Interval(NamedTuple):
    """A mean with its interval; the ends are None where there is none."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        ends = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{ends}"

    @property
    def ends(self) -> list[float] | None:
        """The interval; None: there is none."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def mean_interval(values: Sequence[float]) -> Interval:
    """mean ± t s / sqrt(n), see statistics.t_interval."""
    low, high = t_interval(values) or (None, None)
    return Interval(mean(values), low, high, len(values))


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Geometric mean of values / others and exp(mean ± t s / sqrt(n)) of their logarithms."""
    logs = mean_interval([math.log(a / b) for a, b in zip(values, others, strict=True)])
    ends = [None if end is None else math.exp(end) for end in (logs.low, logs.high)]
    return Interval(math.exp(logs.value), ends[0], ends[1], logs.seeds)


def chosen_guidance(curve: Curve) -> dict[int, Any]:
    """For each seed the guidance that is best on the others; where there is one seed alone, on itself.

    Only scales at which every seed was measured take part.
    """
    seeds = sorted({seed for of in curve.values() for seed in of})
    whole = {guidance: of for guidance, of in curve.items() if len(of) == len(seeds)}
    if not whole:
        return {}
    found = {}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or [seed]
        found[seed] = min(whole, key=lambda g: mean([whole[g][other]["frechet"] for other in others]))
    return found


def rows_of(content: Mapping[str, Any]) -> list[Row]:
    """The points of an eval.json as rows, without arm and seed; an evaluation of one point has one.

    Args:
        content: of eval.json.
    """
    one = {
        "guidance_scale": content.get("guidance_scale"),
        "num_inference_steps": as_tuple((content.get("options") or {}).get("num_inference_steps"))[0],
        "metrics": content.get("metrics", {}),
    }
    rows = []
    for point in content.get("points") or [one]:
        metrics = point["metrics"]
        name = frechet_of(metrics)
        values = {figure: metrics.get(metric, {}).get("value") for figure, metric in FIGURES.items()}
        place = {"guidance": point["guidance_scale"], "sampling_steps": point["num_inference_steps"]}
        rows.append(place | {"frechet": None if name is None else metrics[name]["value"]} | values)
    return rows


def curve_of(rows: Sequence[Row], arm: str, steps: int) -> Curve:
    """The rows of an arm at so many steps that have a Fréchet distance."""
    curve: dict[Any, dict[int, Row]] = {}
    for row in rows:
        if row["arm"] == arm and row["sampling_steps"] == steps and row["frechet"] is not None:
            curve.setdefault(row["guidance"], {})[row["seed"]] = row
    return curve


def edges(curve: Curve) -> dict[float, str]:
    """The chosen scales that are an end of what was measured, and which end: see evaluation.points.edge_of."""
    found = {scale: edge_of(scale, list(curve)) for scale in sorted(set(chosen_guidance(curve).values()) - {None})}
    return {scale: edge for scale, edge in found.items() if edge is not None}


def at_best(rows: Sequence[Row], arm: str, baseline: str) -> list[dict[str, Any]]:
    """An arm against the baseline, each at its own best guidance, for each number of sampling steps.

    Args:
        rows: of both.
        arm, baseline: their names.

    Returns:
        Entries of compare.json's "at_best", the most steps first: arm, sampling_steps, seeds, guidance and
        baseline_guidance (of each seed), scales (that were measured), chosen_on ("other seeds", "itself"), frechet
        (ratio, its interval, ratios) and the differences of DIFFERENCES. None where no seed has both.
    """
    found = []
    for steps in sorted({row["sampling_steps"] for row in rows if row["arm"] == arm}, reverse=True):
        curves = [curve_of(rows, name, steps) for name in (arm, baseline)]
        ours, base = ({seed: curve[scale][seed] for seed, scale in chosen_guidance(curve).items()} for curve in curves)
        seeds = sorted(ours.keys() & base.keys())
        if not seeds:
            continue
        pairs = [(ours[seed], base[seed]) for seed in seeds]
        told: dict[str, Any] = {
            "arm": arm,
            "sampling_steps": steps,
            "seeds": seeds,
            "guidance": [row["guidance"] for row, _ in pairs],
            "baseline_guidance": [row["guidance"] for _, row in pairs],
            "scales": list(dict.fromkeys(scale for curve in curves for scale in curve)),
            "chosen_on": "other seeds" if min(len(ours), len(base)) > 1 else "itself",
        }
        if all(row["frechet"] > 0 for pair in pairs for row in pair):
            ratio = paired_ratio([a["frechet"] for a, _ in pairs], [b["frechet"] for _, b in pairs])
            ratios = [a["frechet"] / b["frechet"] for a, b in pairs]
            told["frechet"] = {"ratio": ratio.value, "interval": ratio.ends, "ratios": ratios}
        for name in DIFFERENCES:
            if all(row[name] is not None for pair in pairs for row in pair):
                difference = mean_interval([a[name] - b[name] for a, b in pairs])
                told[name] = {"difference": difference.value, "interval": difference.ends}
        found.append(told)
    return found


def kind_of(metric: str) -> str:
    """Of a metric's name: "diffusion_loss" or "lpl" for those of validation, else SAMPLES."""
    return metric.rsplit("/", 1)[1] if metric.startswith("validation/") else SAMPLES
