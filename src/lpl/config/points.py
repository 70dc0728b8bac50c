"""Points at which a model is sampled: every pair of a guidance scale and a number of sampling steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

FRECHETS = ("frechet_efficientnet-lite0", "fid", "fd_dinov2")
"""Metrics that the best guidance goes by: the first of them that was measured."""
FOLDER = "points"
"""Within --output_dir, a folder for each point where there are several."""


class Point(NamedTuple):
    """How samples are drawn."""

    guidance_scale: float | None
    """None: the pipeline's own default."""
    num_inference_steps: int

    @property
    def folder(self) -> str:
        """Folder of its samples, within --output_dir where there are several points."""
        scale = [] if self.guidance_scale is None else [f"guidance-{plain(self.guidance_scale)}"]
        return "/".join([FOLDER, "-".join([*scale, f"steps-{self.num_inference_steps}"])])

    def __str__(self) -> str:
        scale = "" if self.guidance_scale is None else f"guidance {plain(self.guidance_scale)}, "
        return f"{scale}{self.num_inference_steps} steps"


def plain(value: float) -> str:
    """A number as people write it, all its digits kept."""
    return repr(float(value)).removesuffix(".0")


def as_tuple(value: Any) -> tuple[Any, ...]:
    """An option that takes one or several values, as several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def frechet_of(metrics: dict[str, dict[str, Any]]) -> str | None:
    """The metric that the best guidance goes by; None: no Fréchet distance has a value."""
    return next((name for name in FRECHETS if metrics.get(name, {}).get("value") is not None), None)


def best_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of steps the guidance with the least Fréchet distance, and whether the list ends there.

    Args:
        points: those of eval.json.

    Returns:
        num_inference_steps, guidance_scale, metric, value, and edge: "end" or "beginning" of the list, where a further
        scale may be better still, else None. The beginning is no edge at 1 or below, which is no guidance. Steps with
        a point without a Fréchet distance are left out.
    """
    found = []
    for steps in sorted({point["num_inference_steps"] for point in points}):
        own = [point for point in points if point["num_inference_steps"] == steps]
        metric = frechet_of(own[0]["metrics"])
        if metric is None or any(point["metrics"][metric]["value"] is None for point in own):
            continue
        best = min(own, key=lambda point: point["metrics"][metric]["value"])
        scale = best["guidance_scale"]
        edge = edge_of(scale, [point["guidance_scale"] for point in own])
        value = best["metrics"][metric]["value"]
        found.append(
            {"num_inference_steps": steps, "guidance_scale": scale, "metric": metric, "value": value, "edge": edge}
        )
    return found


def edge_of(scale: float | None, scales: Sequence[float | None]) -> str | None:
    """Where a further scale may be better than the best: "end" or "beginning" of several; else None."""
    known = [one for one in scales if one is not None]
    if scale is None or len(set(known)) < 2:
        return None
    if scale == max(known):
        return "end"
    return "beginning" if scale == min(known) and scale > 1 else None


def edge_line(scale: float, edge: str) -> str:
    """What to do about an edge, in words."""
    return f"best guidance {plain(scale)} is the {edge} of the list: add a {'higher' if edge == 'end' else 'lower'} one"


def shown_point(points: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The point that stands for all where one is shown: the best guidance at the most steps, or the last point."""
    if not best:
        return points[-1]
    wanted = max(best, key=lambda entry: entry["num_inference_steps"])
    key = (wanted["num_inference_steps"], wanted["guidance_scale"])
    return next(p for p in points if (p["num_inference_steps"], p["guidance_scale"]) == key)
