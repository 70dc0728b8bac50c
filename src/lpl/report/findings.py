"""Charts of comparisons and checks, and names of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpl.report.marks import Chart, Line, Row
from lpl.report.plots import interval_chart, line_chart
from lpl.report.scales import short
from lpl.report.sources import Group, Result

NOISE_FROM = {"repeat": "what a repeat of the baseline changes", "seeds": "what another seed alone changes"}
ABSCISSAE = {"steps": "at equal steps", "seconds": "at equal training time"}
MOST_ROWS = 24
LOSSES = {"diffusion_loss": "Diffusion loss", "lpl": "LPL"}
NAMES = {
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "fid": "FID",
    "kid": "KID",
    "fd_dinov2": "FD-DINOv2",
    "clip_score": "CLIP score",
}


def metric_name(name: str) -> str:
    """A metric's name for readers."""
    if name in NAMES:
        return NAMES[name]
    for start, told in (("frechet_", "Fréchet distance"), ("kernel_", "Kernel distance")):
        if name.startswith(start):
            return f"{told} ({name.removeprefix(start)})"
    if name.startswith("spectrum_log_error_"):
        return f"Spectrum's log error, {name.rsplit('_', 1)[1]} band"
    if name.startswith("validation/"):
        _, kind, loss = name.split("/")
        return f"{LOSSES.get(loss, loss)} ({kind})"
    return name.replace("_", " ")


def paired_charts(
    paired: Sequence[dict[str, Any]], arms: Mapping[str, Group], unpaired: Mapping[str, str | None]
) -> list[Chart]:
    """A chart for each arm and abscissa: every metric's paired difference to the baseline in per cent.

    Args:
        paired: of compare.json, what is to be drawn.
        arms: the comparison's, by name.
        unpaired: why an arm's runs do not see what the baseline's see; None where they do.
    """
    charts = []
    for arm in dict.fromkeys(entry["arm"] for entry in paired):
        for abscissa, told in ABSCISSAE.items():
            entries = [e for e in paired if e["arm"] == arm and e["abscissa"] == abscissa]
            rows = [_paired_row(entry, arms[arm].slot) for entry in entries if entry.get("baseline")]
            if rows:
                how = f"Not paired ({unpaired[arm]})" if unpaired.get(arm) else "Paired by seed"
                note = f"{how}; whiskers: 95 % over seeds (t). One across 0 is no measurable difference."
                title = f"{arms[arm].name}, {told}"
                charts.append(interval_chart(title, note, rows[:MOST_ROWS], "difference to the baseline, %", True, "%"))
    return charts


def _paired_row(entry: dict[str, Any], slot: str) -> Row:
    scale = 100 / abs(entry["baseline"])
    low, high = [scale * v for v in entry["interval"]] if entry.get("interval") else (None, None)
    value = scale * entry["difference"]
    noise = None if entry.get("noise") is None else scale * entry["noise"]
    better = "↓" if entry.get("lower_is_better", True) else "↑"
    said = f"{signed(value)} %" + ("" if low is None or high is None else f"  [{signed(low)}, {signed(high)}]")
    name = metric_name(entry["metric"]).replace(" distance", "").replace("Spectrum's log error", "Spectrum")
    label = f"{name} {better}"
    return Row(
        label, slot, value, low, high, said, noise=noise, noise_is=NOISE_FROM[entry.get("noise_from") or "seeds"]
    )


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    text = short(value, digits)
    return f"+{text}" if value > 0 else text


def check_charts(check: Result) -> list[Chart]:
    """Gradient ratio and cosine by timestep; distance and outliers of each layer."""
    charts = []
    gradients = check.content.get("gradients") or []
    x = [(g["t_low"] + g["t_high"]) / 2 for g in gradients]
    if gradients:
        ratio = Line("|LPL| / |diffusion|", "1", x, [g["ratio"] for g in gradients])
        cosine = Line("cosine", "2", x, [g["cosine"] for g in gradients])
        note = "Norm of LPL's gradient at weight 1 over the diffusion loss's, at the model's output."
        charts.append(line_chart("Gradient ratio", note, [ratio], "timestep", "ratio", log_y=True))
        note = "Angle between the two gradients: 1 the same direction, 0 at right angles, below 0 against each other."
        charts.append(line_chart("Gradient cosine", note, [cosine], "timestep", "cosine", zero=True))
    layers = check.content.get("layers") or []
    for key, title, note, factor in (
        ("distance", "Distance by layer", "LPL of each tap of the decoder, coarsest first.", 1.0),
        ("outlier_fraction", "Outliers by layer", "Part of each tap's features that are masked as outliers.", 100.0),
    ):
        lines = [_layer_line(layer, key, str(i % 8 + 1), factor) for i, layer in enumerate(layers)]
        if lines:
            unit = "%" if factor == 100 else "distance"
            charts.append(line_chart(title, note, lines, "timestep", unit, log_y=factor == 1, zero=factor == 100))
    return charts


def _layer_line(layer: dict[str, Any], key: str, slot: str, factor: float) -> Line:
    bins = layer["bins"]
    x = [(b["t_low"] + b["t_high"]) / 2 for b in bins]
    return Line(str(layer["tap"]), slot, x, [None if b[key] is None else factor * b[key] for b in bins])
