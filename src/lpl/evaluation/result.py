"""The content of eval.json, and its figures as a table for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpl import __version__
from lpl.config.files import environment
from lpl.config.points import FRECHETS, best_points, edge_line, plain, shown_point
from lpl.evaluation.measuring import Measured
from lpl.evaluation.planning import Plan


def eval_result(plan: Plan, found: Sequence[Measured]) -> dict[str, Any]:
    """What is written: of several points each with its figures, and at the top those of the point that is shown.

    Args:
        plan: of all points.
        found: figures of each of plan.each().
    """
    plans = plan.each()
    if len(plans) == 1:
        return _one(plan, found[0])
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
    result = _one(plans[shown], found[shown])
    refused = list(dict.fromkeys(line for own in found for line in own.refused))
    if {p["num_inference_steps"] for p in points} - {entry["num_inference_steps"] for entry in best}:
        refused.append("best guidance: goes by the Fr\u00e9chet distance, which was not measured at every point")
    return result | {"refused": refused, "points": points, "best": best}


def edge_lines(result: dict[str, Any]) -> list[str]:
    """A line for each number of steps whose best guidance lies at the edge of the list."""
    lines = [(e["num_inference_steps"], edge_line(e["guidance_scale"], e["edge"])) for e in result["best"] if e["edge"]]
    return [f"{steps} steps: {line}" for steps, line in lines]


def _one(plan: Plan, found: Measured) -> dict[str, Any]:
    options, home = plan.options, Path(plan.options.output_dir)
    drawn = options.images is None
    above = home if drawn else Path(str(options.images))
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


HEADER = ("metric", "value", "95 % interval", "VAE's floor", "better")
SHOWN = (*FRECHETS, "precision", "recall", "spectrum_log_error_high", "clip_score")
"""Metrics of a row for each point; eval.json has all."""


def format_table(result: Mapping[str, Any]) -> str:
    """The figures of an eval.json, a line each, or of several points a row each, then what is to be known.

    Args:
        result: see evaluation.result.
    """
    points = result.get("points")
    rows = _by_metric(result) if points is None else _by_point(points)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    title = f"{result['num_samples']} samples of {result['model']} against {result['num_reference']} {_what(result)}"
    notes: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for metrics in [result["metrics"]] if points is None else [point["metrics"] for point in points]:
        for name, metric in metrics.items():
            if metric["note"]:
                notes[metric["note"]][name] = None
    best = []
    if points is not None:
        best = [
            f"best at {e['num_inference_steps']} steps: guidance {_scale(e['guidance_scale'])} ({_number(e['value'])})"
            for e in result["best"]
        ]
        best += edge_lines(dict(result))
    marked = [f"{', '.join(names)}: {note}" for note, names in notes.items() if not note.startswith("refused")]
    told = [*best, *marked, *(f"skipped: {line}" for line in result["refused"])]
    return "\n".join([title, "", *lines, *([""] if told else []), *told])


def _by_metric(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    floor = "VAE's floor" if result["options"]["against"] == "images" else "half : half"
    rows: list[tuple[str, ...]] = [(*HEADER[:3], floor, HEADER[4])]
    for name, metric in result["metrics"].items():
        direction = "lower" if metric["lower_is_better"] else "higher"
        rows.append((name, _number(metric["value"]), _interval(metric), _number(metric["floor"]), direction))
    return rows


def _by_point(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    names = [name for name in SHOWN if any(name in point["metrics"] for point in points)]
    if not set(names) & set(FRECHETS):
        names += [name for name in points[0]["metrics"] if name not in names]
    heads = [part for name in names for part in ((name, "95 % interval") if name in FRECHETS else (name,))]
    rows: list[tuple[str, ...]] = [("steps", "guidance", *heads)]
    for point in points:
        found = []
        for name in names:
            metric = point["metrics"].get(name, {"value": None, "interval": None})
            found += [_number(metric["value"]), *([_interval(metric)] if name in FRECHETS else [])]
        rows.append((str(point["num_inference_steps"]), _scale(point["guidance_scale"]), *found))
    return rows


def _scale(scale: float | None) -> str:
    return "its own" if scale is None else plain(scale)


def _what(result: Mapping[str, Any]) -> str:
    kind = "images" if result["options"]["against"] == "images" else "images as the VAE reconstructs them"
    return f"{kind} of {result['reference']}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]).rstrip()


def _interval(metric: Mapping[str, Any]) -> str:
    ends = metric["interval"]
    return "-" if ends is None else f"{_number(ends[0])} .. {_number(ends[1])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
