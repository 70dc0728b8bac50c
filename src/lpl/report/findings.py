"""Results of comparisons and checks: charts, verdict cards and their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lpl.config.points import plain
from lpl.report.charts import Chart, IntervalRow, Line
from lpl.report.curves import LOSSES
from lpl.report.numbers import signed
from lpl.report.plots import interval_chart, line_chart
from lpl.report.sources import Group, Result


class NoiseSource(NamedTuple):
    """Texts for how the noise of a metric was measured."""

    cause: str
    in_chart: str
    in_table: str


NOISE = {
    "repeat": NoiseSource("a repeat of the baseline", "what a repeat of the baseline changes", "of the repeat"),
    "seeds": NoiseSource("another seed", "what another seed alone changes", "between seeds"),
}
ABSCISSAE = {"steps": "at equal steps", "seconds": "at equal training time"}
MOST_ROWS = 24
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
        paired: the entries of compare.json to draw.
        arms: the comparison's arms, by name.
        unpaired: why an arm's runs do not get the same draws as the baseline's; None where they do.
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


def _paired_row(entry: dict[str, Any], slot: str) -> IntervalRow:
    scale = 100 / abs(entry["baseline"])
    low, high = [scale * v for v in entry["interval"]] if entry.get("interval") else (None, None)
    value = scale * entry["difference"]
    noise = None if entry.get("noise") is None else scale * entry["noise"]
    better = "↓" if entry.get("lower_is_better", True) else "↑"
    said = f"{signed(value)} %" + ("" if low is None or high is None else f"  [{signed(low)}, {signed(high)}]")
    name = metric_name(entry["metric"]).replace(" distance", "").replace("Spectrum's log error", "Spectrum")
    noise_is = NOISE[entry.get("noise_from") or "seeds"].in_chart
    return IntervalRow(f"{name} {better}", slot, value, low, high, said, noise=noise, noise_is=noise_is)


def check_charts(check: Result) -> list[Chart]:
    """Gradient ratio and cosine by timestep; distance and outliers of each layer."""
    charts = []
    gradients = check.content.get("gradients") or []
    if gradients:
        x = _middles(gradients)
        ratio = Line("|LPL| / |diffusion|", "1", x, [g["ratio"] for g in gradients])
        cosine = Line("cosine", "2", x, [g["cosine"] for g in gradients])
        note = "Norm of LPL's gradient at weight 1 over the diffusion loss's, at the model's output."
        charts.append(line_chart("Gradient ratio", note, [ratio], "timestep", "ratio", log_y=True))
        note = "Angle between the two gradients: 1 the same direction, 0 at right angles, below 0 against each other."
        charts.append(line_chart("Gradient cosine", note, [cosine], "timestep", "cosine", zero=True))
    for key, title, note, factor in (
        ("distance", "Distance by layer", "LPL of each tap of the decoder, coarsest first.", 1.0),
        ("outlier_fraction", "Outliers by layer", "Part of each tap's features that are masked as outliers.", 100.0),
    ):
        lines = []
        for i, layer in enumerate(check.content.get("layers") or []):
            y = [None if b[key] is None else factor * b[key] for b in layer["bins"]]
            lines.append(Line(str(layer["tap"]), str(i % 8 + 1), _middles(layer["bins"]), y))
        if lines:
            unit = "%" if factor == 100 else "distance"
            charts.append(line_chart(title, note, lines, "timestep", unit, log_y=factor == 1, zero=factor == 100))
    return charts


def _middles(bins: Sequence[dict[str, Any]]) -> list[float]:
    return [(b["t_low"] + b["t_high"]) / 2 for b in bins]


OUTCOMES = ("better", "worse", "below", "none", "unknown")
"""Outcomes of a metric; "below": a difference smaller than the noise."""

TONES = {"helps": "good", "harms": "bad", "mixed": "mixed"}
"""An arm's colour, by the outcome of its sentence."""


def shown_entries(content: dict[str, Any], final: str | None) -> list[dict[str, Any]]:
    """The paired metrics that the page draws; validation losses only of the weights that the results contain.

    `final` is "raw" or "ema"; None: not known, so all are shown.
    """
    paired: list[dict[str, Any]] = content.get("paired", [])
    kept = [e for e in paired if not e["metric"].startswith("validation/") or e["metric"].split("/")[1] == final]
    return paired if final is None else kept


def verdicts(
    content: dict[str, Any], paired: Sequence[dict[str, Any]], arms: Mapping[str, Group]
) -> list[dict[str, Any]]:
    """For each arm of a compare.json against the baseline: a headline, the metrics behind it and the options.

    `paired`: the metrics that count.
    """
    found, told = [], {entry["arm"]: entry["outcome"] for entry in content.get("verdicts", [])}
    for arm in content.get("arms", []):
        own = [entry for entry in paired if entry["arm"] == arm["name"]]
        if arm.get("baseline") or not own:
            continue
        repeats = bool(arm.get("repeats"))
        overrides = ", ".join(f"{name} {value}" for name, value in arm.get("overrides", {}).items())
        group = arms[arm["name"]]
        headlines, details = [], []
        for abscissa, at in ABSCISSAE.items():
            entries = [entry for entry in own if entry["abscissa"] == abscissa]
            if entries:
                alone = all(entry["metric"].startswith("validation/") for entry in entries)
                where = f"Validation {at}" if alone else f"{at[0].upper()}{at[1:]}"
                headlines.append(f"{where}: {headline(entries, repeats)}")
                details += _details(entries, at, repeats)
        found.append(
            {
                "arm": group.name,
                "slot": group.slot,
                "unpaired": arm.get("unpaired"),
                "overrides": "nothing is changed: a repeat of the baseline" if repeats else overrides,
                "tone": "" if repeats else TONES.get(told[arm["name"]], "") if arm["name"] in told else tone(own),
                "headlines": headlines,
                "details": details,
            }
        )
    return found


def outcome_of(entry: dict[str, Any]) -> str:
    """One of OUTCOMES."""
    outcome, noise = str(entry.get("outcome")), entry.get("noise")
    within = noise is not None and abs(entry["difference"]) < noise
    return "below" if outcome in ("better", "worse") and within else outcome


def tone(entries: Sequence[dict[str, Any]]) -> str:
    """ "good", "bad", "mixed" or nothing, from all outcomes of an arm that are beyond the noise."""
    found = {outcome_of(entry) for entry in entries}
    if {"better", "worse"} <= found:
        return "mixed"
    return "good" if "better" in found else "bad" if "worse" in found else ""


def headline(entries: Sequence[dict[str, Any]], repeats: bool = False) -> str:
    """Counts of the outcomes of an arm's metrics at one abscissa; `repeats`: the arm has the baseline's options."""
    outcomes = [outcome_of(entry) for entry in entries]
    number = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    if number["unknown"] == len(entries):
        one = all(entry.get("seeds", 1) == 1 for entry in entries)
        return "one seed, so no interval and no verdict" if one else "no interval is known, so no verdict"
    if number["none"] == len(entries):
        return "no measurable difference"
    of = f"of {len(entries)} figure{'s' if len(entries) > 1 else ''}"
    if repeats:
        other = number["better"] + number["worse"] + number["below"]
        parts = [f"another in {other} {of}, by rounding alone"] if other else []
    else:
        parts = [f"{key} in {number[key]} {of}" for key in ("better", "worse") if number[key]]
        if number["below"]:
            parts.append(f"{number['below']} {of} differ{'s' * (number['below'] == 1)} by less than {_noise(entries)}")
    if number["none"]:
        parts.append(f"no measurable difference in {number['none']}")
    if number["unknown"]:
        parts.append(f"no verdict in {number['unknown']}")
    return ", ".join(parts)


def _noise(entries: Sequence[dict[str, Any]]) -> str:
    """The noise that differences are below, in words."""
    sources = dict.fromkeys(e.get("noise_from") or "seeds" for e in entries if outcome_of(e) == "below")
    return " or ".join(NOISE[source].in_chart for source in sources)


def _details(entries: Sequence[dict[str, Any]], at: str, repeats: bool) -> list[str]:
    """The metrics that differ, a line for each outcome."""
    told: dict[tuple[str, ...], str] = {("better",): "Better", ("worse",): "Worse", ("below",): "Within the noise"}
    if repeats:
        told = {("better", "worse", "below"): "Another"}
    lines = []
    for outcomes, words in told.items():
        parts = []
        for e in entries:
            if outcome_of(e) in outcomes:
                size = f" {signed(100 * e['difference'] / abs(e['baseline']), 2)} %" if e.get("baseline") else ""
                parts.append(metric_name(e["metric"]) + size)
        if parts:
            lines.append(f"{words} {at}: {'; '.join(parts)}")
    return lines


def chance_line(paired: Sequence[dict[str, Any]]) -> str:
    """How many verdicts would find a difference where there is none: one in 20, as intervals cover 95 %.

    Empty where none of compare.json's "paired" has a verdict.
    """
    compared = sum(entry.get("outcome", "unknown") != "unknown" for entry in paired)
    told = "1 verdict" if compared == 1 else f"{compared} verdicts"
    return f"of {told}, about {compared / 20:.3g} would find a difference by chance alone" if compared else ""


def best_scales(entry: dict[str, Any]) -> str:
    """The guidances in an entry of "at_best": the baseline's, then the arm's."""
    sides = [sorted(set(entry[side]) - {None}) for side in ("baseline_guidance", "guidance")]
    return " → ".join("/".join(map(plain, side)) or "its own" for side in sides)
