"""The content of eval.json, and its metrics as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpl import __version__
from lpl.base.terminal import columns, with_names
from lpl.config.environment import environment
from lpl.config.points import FRECHETS, best_points, edge_line, plain, shown_point
from lpl.evaluation.measuring import PointMetrics
from lpl.evaluation.planning import Plan

SHOWN = (*FRECHETS, "precision", "recall", "spectrum_log_error_high", "clip_score")
"""Metrics in the row of each point; eval.json has all."""


def eval_result(plan: Plan, found: Sequence[PointMetrics]) -> dict[str, Any]:
    """What is written: with several points, each with its metrics, and at the top those of the point that is shown.

    Args:
        plan: of all points.
        found: metrics of each of plan.each().
    """
    plans = plan.each()
    if len(plans) == 1:
        return _of_point(plan, found[0])
    points = [
        {
            "guidance_scale": one.points[0].guidance_scale,
            "num_inference_steps": one.points[0].num_inference_steps,
            "folder": one.points[0].folder,
            "metrics": own.metrics,
            "spectrum": own.spectrum,
        }
        for one, own in zip(plans, found, strict=True)
    ]
    best = best_points(points)
    shown = points.index(shown_point(points, best))
    refused = list(dict.fromkeys(line for own in found for line in own.refused))
    if {p["num_inference_steps"] for p in points} - {entry["num_inference_steps"] for entry in best}:
        refused.append("best guidance: goes by the Fréchet distance, which was not measured at every point")
    return _of_point(plans[shown], found[shown]) | {"refused": refused, "points": points, "best": best}


def _of_point(plan: Plan, found: PointMetrics) -> dict[str, Any]:
    options = plan.options
    drawn = options.images is None
    above = Path(options.output_dir if drawn else str(options.images))
    prompts: Sequence[str | None] = plan.prompts or [None] * len(plan.files)
    return {
        "lpl": __version__,
        "kind": "eval",
        "environment": environment(),
        "options": asdict(options),
        "refused": found.refused,
        "model": options.pretrained_model_name_or_path if drawn else options.images,
        "reference": options.reference_dir,
        "num_samples": len(plan.files),
        "num_reference": found.num_reference,
        "reference_digest": found.reference_digest,
        "prompts_digest": plan.prompts_digest,
        "resolution": plan.resolution,
        "guidance_scale": plan.points[0].guidance_scale if drawn else None,
        "features": found.features,
        "metrics": found.metrics,
        "spectrum": found.spectrum,
        "image_root": None if drawn else str(above.resolve()),
        "images": [
            {
                "prompt": prompt,
                "seed": options.seed if drawn else None,
                "index": index,
                "file": file.relative_to(above).as_posix(),
            }
            for index, (file, prompt) in enumerate(zip(plan.files, prompts, strict=True))
        ],
    }


def format_table(result: Mapping[str, Any]) -> str:
    """The metrics of an eval.json, a line each, or with several points a row for each; then notes."""
    points, against_images = result.get("points"), result["options"]["against"] == "images"
    lines = columns(_by_metric(result, against_images) if points is None else _by_point(points), right=True)
    lines.insert(1, "-" * len(lines[0]))
    kind = "images" if against_images else "images as the VAE reconstructs them"
    title = f"{result['num_samples']} samples of {result['model']} against {result['num_reference']} {kind}"
    told = []
    best = [] if points is None else result["best"]
    for e in best:
        scale, value = _scale(e["guidance_scale"]), _number(e["value"])
        told.append(f"best at {e['num_inference_steps']} steps: guidance {scale} ({value})")
    told += [
        f"{e['num_inference_steps']} steps: {edge_line(e['guidance_scale'], e['edge'])}" for e in best if e["edge"]
    ]
    metrics = [item for point in (points or [result]) for item in point["metrics"].items()]
    notes = [(name, metric["note"]) for name, metric in metrics if metric["note"]]
    told += with_names((name, note) for name, note in notes if not note.startswith("refused"))
    told += [f"skipped: {line}" for line in result["refused"]]
    return "\n".join([f"{title} of {result['reference']}", "", *lines, *([""] if told else []), *told])


def _by_metric(result: Mapping[str, Any], against_images: bool) -> list[list[str]]:
    rows = [["metric", "value", "95 % interval", "VAE's floor" if against_images else "half : half", "better"]]
    for name, metric in result["metrics"].items():
        direction = "lower" if metric["lower_is_better"] else "higher"
        rows.append([name, _number(metric["value"]), _interval(metric), _number(metric["floor"]), direction])
    return rows


def _by_point(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = [name for name in SHOWN if any(name in point["metrics"] for point in points)]
    if not set(names) & set(FRECHETS):
        names += [name for name in points[0]["metrics"] if name not in names]
    heads = [part for name in names for part in ((name, "95 % interval") if name in FRECHETS else (name,))]
    rows = [["steps", "guidance", *heads]]
    for point in points:
        row = [str(point["num_inference_steps"]), _scale(point["guidance_scale"])]
        for name in names:
            metric = point["metrics"].get(name, {"value": None, "interval": None})
            row += [_number(metric["value"]), *([_interval(metric)] if name in FRECHETS else [])]
        rows.append(row)
    return rows


def _scale(scale: float | None) -> str:
    return "its own" if scale is None else plain(scale)


def _interval(metric: Mapping[str, Any]) -> str:
    ends = metric["interval"]
    return "-" if ends is None else f"{_number(ends[0])} .. {_number(ends[1])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
