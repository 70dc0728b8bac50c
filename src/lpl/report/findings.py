"""Charts of what was measured at the end: comparisons, metrics against a reference, spectra and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lpl.comparison.statistics import mean, t_interval
from lpl.report.plots import Chart, Line, Row, interval_chart, line_chart
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


def paired_charts(paired: Sequence[dict[str, Any]], slots: dict[str, str]) -> list[Chart]:
    """A chart for each arm and abscissa: every metric's paired difference to the baseline in per cent.

    Args:
        paired: of compare.json, what is to be drawn.
        slots: the colour of each arm.
    """
    charts = []
    for arm in dict.fromkeys(entry["arm"] for entry in paired):
        for abscissa, told in ABSCISSAE.items():
            entries = [e for e in paired if e["arm"] == arm and e["abscissa"] == abscissa]
            rows = [_paired_row(entry, slots.get(arm, "1")) for entry in entries if entry.get("baseline")]
            if rows:
                note = "Paired by seed; whiskers: 95 % over seeds (t). One across 0 is no measurable difference."
                charts.append(
                    interval_chart(f"{arm}, {told}", note, rows[:MOST_ROWS], "difference to the baseline, %", True, "%")
                )
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


def metric_charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart for each metric: every model's value with its interval, beside the VAE's own floor."""
    groups = [group for group in groups if group.evals]
    names = dict.fromkeys(name for g in groups for e in g.evals for name in e.content.get("metrics", {}))
    charts = []
    for name in names:
        rows, notes, lower = [], [], True
        for group in groups:
            found = [e.content["metrics"][name] for e in group.evals if name in e.content.get("metrics", {})]
            known = [m for m in found if m.get("value") is not None]
            notes += [(group.name, str(m["note"])) for m in found if m.get("note")]
            if known:
                lower = bool(known[0].get("lower_is_better", True))
                rows.append(_metric_row(group, known))
        if rows:
            note = f"{'Lower' if lower else 'Higher'} is better.{_told_notes(notes, len(groups))}"
            charts.append(interval_chart(metric_name(name), note, rows, metric_name(name)))
    return charts


def refused_figures(groups: Sequence[Group]) -> list[str]:
    """Lines on the figures that evaluations name without a value."""
    metrics = [(name, m) for g in groups for e in g.evals for name, m in e.content.get("metrics", {}).items()]
    lines = [f"{metric_name(name)}: {m.get('note') or 'no value'}" for name, m in metrics if m.get("value") is None]
    return list(dict.fromkeys(lines))


def _told_notes(notes: Sequence[tuple[str, str]], groups: int) -> str:
    """Each note once, with the models it is of, unless it is of all."""
    by_note: dict[str, dict[str, None]] = {}
    for name, note in notes:
        by_note.setdefault(note, {})[name] = None
    told = [note if len(names) == groups else f"{', '.join(names)}: {note}" for note, names in by_note.items()]
    return "".join(f" {text[0].upper()}{text[1:]}." for text in told)


def _metric_row(group: Group, found: Sequence[dict[str, Any]]) -> Row:
    values = [float(m["value"]) for m in found]
    interval = t_interval(values) if len(values) > 1 else found[0].get("interval")
    low, high = interval or (None, None)
    floors = [m["floor"] for m in found if m.get("floor") is not None]
    points = values if len(values) > 1 else ()
    return Row(group.name, group.slot, mean(values), low, high, points=points, mark=floors[0] if floors else None)


def spectrum_charts(groups: Sequence[Group]) -> list[Chart]:
    """Power spectra of samples, reference and floor, and the samples' ratio to the reference."""
    lines: list[Line] = []
    ratios: list[Line] = []
    for group in groups:
        spectra = [e.content["spectrum"] for e in group.evals if e.content.get("spectrum")]
        if not spectra:
            continue
        first = spectra[0]
        x = first["frequency"]
        same = [s for s in spectra if s["frequency"] == x]
        power = [mean(values) for values in zip(*(s["samples"] for s in same), strict=True)]
        if not lines:
            lines.append(Line("real images", "ink", x, first["reference"]))
            if first.get("floor"):
                told = "real images through the VAE"
                lines.append(Line(told, "floor", x, first["floor"]))
                ratios.append(Line(told, "floor", x, _ratio(first["floor"], first["reference"])))
        lines.append(Line(group.name, group.slot, x, power))
        ratios.append(Line(group.name, group.slot, x, _ratio(power, first["reference"])))
    if not lines:
        return []
    unit = "frequency, cycles per pixel"
    note = "Radially averaged; the right end is the finest detail."
    told = "Samples against real images: 1 is as much detail as real, below 1 is blur."
    return [
        line_chart("Power spectrum", note, lines, unit, "power", log_x=True, log_y=True),
        line_chart("Detail against real images", told, ratios, unit, "power ratio", log_y=True),
    ]


def _ratio(power: Sequence[float], reference: Sequence[float]) -> list[float | None]:
    return [p / r if r > 0 else None for p, r in zip(power, reference, strict=True)]


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
