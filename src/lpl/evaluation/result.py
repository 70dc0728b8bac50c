"""The content of eval.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpl import __version__
from lpl.config_io import environment
from lpl.evaluation.measuring import Measured
from lpl.evaluation.planning import Plan
from lpl.evaluation.points import best_points, edge_line, shown_point


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
