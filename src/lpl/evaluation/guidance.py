"""Metrics at points of guidance and sampling steps: each arm's own best guidance, and arms compared at it.

A row is a point of a run: arm, seed, guidance, sampling_steps, frechet and further metrics. An arm's metric of a seed
is that at the guidance with the least mean Fréchet distance over the arm's *other* seeds (leave one out), so that no
seed chooses for itself. Ratios are paired by seed, with Student's 95 % interval of their mean logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lpl.config.points import as_tuple, edge_line, edge_of, frechet_of
from lpl.evaluation.intervals import mean_interval, paired_ratio

Row = dict[str, Any]
ByGuidance = Mapping[Any, Mapping[int, Row]]
"""Rows of an arm at one number of steps, by guidance (None: the pipeline's own) and seed."""
ROW_METRICS = {
    "precision": "precision",
    "recall": "recall",
    "low_band_log_error": "spectrum_log_error_low",
    "middle_band_log_error": "spectrum_log_error_middle",
    "high_band_log_error": "spectrum_log_error_high",
}
"""Metrics of a row beside frechet, and their names in eval.json."""
SAMPLES = "samples"
"""Kind of the metrics of `lpl eval`."""
DIFFERENCES = ("precision", "recall", "high_band_log_error")
"""Metrics that are compared by their difference."""


def chosen_guidance(curve: ByGuidance) -> dict[int, Any]:
    """For each seed the guidance that is best on the others; if there is only one seed, on itself.

    Only scales at which every seed was measured take part.
    """
    seeds = sorted({seed for of in curve.values() for seed in of})
    whole = {guidance: of for guidance, of in curve.items() if len(of) == len(seeds)}
    found = {}
    for seed in seeds if whole else []:
        others = [other for other in seeds if other != seed] or [seed]
        found[seed] = min(whole, key=lambda g: fmean([whole[g][other]["frechet"] for other in others]))
    return found


def rows_of(content: Mapping[str, Any]) -> list[Row]:
    """The points of an eval.json as rows, without arm and seed; an evaluation of one point has one."""
    one = {
        "guidance_scale": content.get("guidance_scale"),
        "num_inference_steps": as_tuple((content.get("options") or {}).get("num_inference_steps"))[0],
        "metrics": content.get("metrics", {}),
    }
    rows = []
    for point in content.get("points") or [one]:
        metrics = point["metrics"]
        name = frechet_of(metrics)
        values = {metric: metrics.get(full_name, {}).get("value") for metric, full_name in ROW_METRICS.items()}
        place = {"guidance": point["guidance_scale"], "sampling_steps": point["num_inference_steps"]}
        rows.append(place | {"frechet": None if name is None else metrics[name]["value"]} | values)
    return rows


def curve_of(rows: Sequence[Row], arm: str, steps: int) -> ByGuidance:
    """The rows of an arm at `steps` sampling steps that have a Fréchet distance."""
    curve: dict[Any, dict[int, Row]] = {}
    for row in rows:
        if row["arm"] == arm and row["sampling_steps"] == steps and row["frechet"] is not None:
            curve.setdefault(row["guidance"], {})[row["seed"]] = row
    return curve


def edges(curve: ByGuidance) -> dict[float, str]:
    """The chosen scales that are an end of what was measured, and which end: see config.points.edge_of."""
    found = {scale: edge_of(scale, list(curve)) for scale in sorted(set(chosen_guidance(curve).values()) - {None})}
    return {scale: edge for scale, edge in found.items() if edge is not None}


def edge_notes(rows: Sequence[Row], arms: Sequence[str]) -> list[str]:
    """A line for each arm and number of steps whose best guidance is the end of what was measured."""
    return [
        f"{arm}, {steps} steps: {edge_line(scale, edge)}"
        for arm in arms
        for steps in sorted({row["sampling_steps"] for row in rows if row["arm"] == arm})
        for scale, edge in edges(curve_of(rows, arm, steps)).items()
    ]


def at_best(rows: Sequence[Row], arm: str, baseline: str) -> list[dict[str, Any]]:
    """An arm against the baseline, each at its own best guidance, for each number of sampling steps.

    Args:
        rows: of both.
        arm, baseline: their names.

    Returns:
        Entries of compare.json's "at_best", the most steps first: arm, sampling_steps, seeds, guidance and
        baseline_guidance (of each seed), scales (that were measured), chosen_on ("other seeds", "itself"), frechet
        (ratio, its interval, ratios) and the differences of DIFFERENCES. Steps at which no seed has both are left out.
    """
    found = []
    for steps in sorted({row["sampling_steps"] for row in rows if row["arm"] == arm}, reverse=True):
        curves = [curve_of(rows, name, steps) for name in (arm, baseline)]
        ours, base = ({seed: curve[scale][seed] for seed, scale in chosen_guidance(curve).items()} for curve in curves)
        seeds = sorted(ours.keys() & base.keys())
        if not seeds:
            continue
        pairs = [(ours[seed], base[seed]) for seed in seeds]
        entry: dict[str, Any] = {
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
            entry["frechet"] = {"ratio": ratio.value, "interval": ratio.ends, "ratios": ratios}
        for name in DIFFERENCES:
            if all(row[name] is not None for pair in pairs for row in pair):
                difference = mean_interval([a[name] - b[name] for a, b in pairs])
                entry[name] = {"difference": difference.value, "interval": difference.ends}
        found.append(entry)
    return found


def kind_of(metric: str) -> str:
    """The kind of a metric, by its name: "diffusion_loss" or "lpl" for those of validation, else SAMPLES."""
    return metric.rsplit("/", 1)[1] if metric.startswith("validation/") else SAMPLES
