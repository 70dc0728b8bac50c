"""Results of evaluations: metrics, spectra and curves over guidance as charts, and tables of what was compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lpl.base.terminal import with_names
from lpl.config.points import frechet_of, plain
from lpl.evaluation.guidance import DIFFERENCES, SAMPLES, Row, rows_of
from lpl.evaluation.intervals import t_interval
from lpl.report.charts import Chart, IntervalRow, Line, Table
from lpl.report.findings import best_scales, metric_name
from lpl.report.numbers import bracketed, short, signed
from lpl.report.plots import interval_chart, line_chart
from lpl.report.sources import Group, Inputs, Result, shortest_ends


class Against(NamedTuple):
    """The names of what samples are compared with."""

    table: str
    reference: str
    floor: str
    spectrum: str
    """Name of the floor's images, for its spectrum."""


AGAINST = {
    "images": Against("images", "real images", "the VAE's own floor", "real images through the VAE"),
    "reconstructions": Against(
        "the VAE's reconstructions of them",
        "real images through the VAE",
        "the floor: half of the reconstructions against the other half",
        "half of the real images through the VAE",
    ),
}


class Setting(NamedTuple):
    """What metrics depend on besides the model: only metrics of one setting are drawn on one axis."""

    samples: int | None
    reference: str
    images: int | None
    resolution: int | None
    against: str
    features: str
    digest: str
    """Digest of the reference's images; empty: not known, as in an older eval.json."""
    alike: bool
    """False: the metrics of the arm's samples are defined otherwise than the baseline's."""


UNITS = {"samples": "{} samples", "images": "{} images", "resolution": "{} px", "features": "in {}"}
Drawn = list[tuple[Group, list[Result]]]


def evaluation_table(groups: Sequence[Group]) -> Table:
    """What was compared with what, a row for each group and setting."""
    rows = []
    for setting, drawn in by_setting(groups).items():
        numbers = ["–" if n is None else f"{n:,}" for n in (setting.samples, setting.images)]
        pixels = "–" if setting.resolution is None else f"{setting.resolution} px"
        for group, results in drawn:
            models = list(dict.fromkeys(str(r.content.get("model", "–")) for r in results))
            model = models[0] + (f" and {len(models) - 1} more" if len(models) > 1 else "")
            told = [numbers[0], setting.reference, numbers[1], pixels, AGAINST[setting.against].table, setting.features]
            rows.append([group.name, model, *told])
    header = ["Evaluation", "Model", "Samples", "Reference", "Its images", "Resolution", "Against", "Features"]
    return Table(header, rows)


def metric_charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart for each metric and setting: every model's value with its interval, and the floor."""
    settings = by_setting(groups)
    told = told_apart(list(settings))
    names = dict.fromkeys(name for drawn in settings.values() for _, rs in drawn for r in rs for name in _metrics(r))
    charts = []
    for name in names:
        for setting, drawn in settings.items():
            rows, notes, lower = [], [], True
            for group, results in drawn:
                found = [_metrics(r)[name] for r in results if name in _metrics(r)]
                known = [m for m in found if m.get("value") is not None]
                notes += [(group.name, str(m["note"])) for m in found if m.get("note")]
                if known:
                    lower = bool(known[0].get("lower_is_better", True))
                    rows.append(_metric_row(group, known, AGAINST[setting.against].floor))
            if rows:
                sentences = [f" {line[0].upper()}{line[1:]}." for line in with_names(notes, len(drawn))]
                note = f"{'Lower' if lower else 'Higher'} is better.{''.join(sentences)}"
                if any(result.content.get("points") for _, results in drawn for result in results):
                    note += " Of several points of guidance and steps: the best guidance at the most steps."
                title = metric_name(name)
                charts.append(interval_chart(title + told[setting], note, rows, title))
    return charts


def _metrics(result: Result) -> dict[str, dict[str, Any]]:
    return dict(result.content.get("metrics", {}))


def _metric_row(group: Group, found: Sequence[dict[str, Any]], floor: str) -> IntervalRow:
    """A group's value; for evaluations of several runs their mean, with Student's t interval over the runs."""
    values = [float(m["value"]) for m in found]
    low, high = (t_interval(values) if len(values) > 1 else found[0].get("interval")) or (None, None)
    mark = next((m["floor"] for m in found if m.get("floor") is not None), None)
    points = values if len(values) > 1 else ()
    return IntervalRow(group.name, group.slot, fmean(values), low, high, points=points, mark=mark, mark_is=floor)


def refused_metrics(groups: Sequence[Group]) -> list[str]:
    """Lines on the metrics that evaluations list without a value."""
    metrics = [(name, m) for g in groups for e in g.evals for name, m in _metrics(e).items()]
    lines = [f"{metric_name(name)}: {m.get('note') or 'no value'}" for name, m in metrics if m.get("value") is None]
    return list(dict.fromkeys(lines))


def spectrum_charts(groups: Sequence[Group]) -> list[Chart]:
    """For each setting, power spectra of samples, reference and floor, and their ratio to the reference."""
    settings = by_setting(groups)
    told = told_apart(list(settings))
    return [chart for setting, drawn in settings.items() for chart in _spectra(setting, drawn, told[setting])]


def _spectra(setting: Setting, drawn: Drawn, told: str) -> list[Chart]:
    words, lines, ratios = AGAINST[setting.against], list[Line](), list[Line]()
    for group, results in drawn:
        spectra = [r.content["spectrum"] for r in results if r.content.get("spectrum")]
        if not spectra:
            continue
        first = spectra[0]
        x, reference = first["frequency"], first["reference"]
        power = [fmean(v) for v in zip(*(s["samples"] for s in spectra if s["frequency"] == x), strict=True)]
        if not lines:
            lines.append(Line(words.reference, "ink", x, reference))
            if first.get("floor"):
                lines.append(Line(words.spectrum, "floor", x, first["floor"]))
                ratios.append(Line(words.spectrum, "floor", x, _ratio(first["floor"], reference)))
        lines.append(Line(group.name, group.slot, x, power))
        ratios.append(Line(group.name, group.slot, x, _ratio(power, reference)))
    if not lines:
        return []
    unit = "frequency, cycles per pixel"
    note = "Radially averaged; the right end is the finest detail."
    ratio = f"Samples against {words.reference}: 1 is as much detail, below 1 is blur."
    title = f"Detail against {words.reference}{told}"
    return [
        line_chart(f"Power spectrum{told}", note, lines, unit, "power", log_x=True, log_y=True),
        line_chart(title, ratio, ratios, unit, "power ratio", log_y=True),
    ]


def _ratio(power: Sequence[float], reference: Sequence[float]) -> list[float | None]:
    return [p / r if r > 0 else None for p, r in zip(power, reference, strict=True)]


def by_setting(groups: Sequence[Group]) -> dict[Setting, Drawn]:
    """The evaluations of each setting, by group. References with the same content get the name of the first."""
    found: dict[Setting, dict[str, tuple[Group, list[Result]]]] = {}
    references: dict[str, str] = {}
    for group in groups:
        for result in group.evals:
            told = result.content
            reference, digest = str(told.get("reference", "–")), str(told.get("reference_digest") or "")
            setting = Setting(
                told.get("num_samples"),
                references.setdefault(digest, reference) if digest else reference,
                told.get("num_reference"),
                told.get("resolution"),
                str((told.get("options") or {}).get("against", "images")),
                str(told.get("features") or "–"),
                digest,
                SAMPLES not in group.redefined,
            )
            found.setdefault(setting, {}).setdefault(group.name, (group, []))[1].append(result)
    return {setting: list(drawn.values()) for setting, drawn in found.items()}


def told_apart(settings: Sequence[Setting]) -> dict[Setting, str]:
    """The text for a setting in titles: the parts in which settings differ."""
    differs = [name for name in Setting._fields if len({getattr(s, name) for s in settings}) > 1]
    if not differs:
        return dict.fromkeys(settings, "")
    ends = dict(zip((s.reference for s in settings), shortest_ends([Path(s.reference) for s in settings]), strict=True))
    found = {}
    for setting in settings:
        several = len({s.digest for s in settings if s.reference == setting.reference}) > 1
        told = {
            "reference": f"reference {ends[setting.reference]}",
            "against": f"against {setting.against}",
            "digest": f"its images {setting.digest[:6] or 'unknown'}" if several else None,
            "alike": None if setting.alike else "another yardstick",
        }
        for name, words in UNITS.items():
            value = getattr(setting, name)
            told[name] = None if value is None else words.format(value)
        parts = [told[name] for name in differs]
        found[setting] = f" ({', '.join(filter(None, parts))})" if any(parts) else ""
    return found


CURVES = {"frechet": "Fréchet distance", "recall": "Recall"}
DIRECTION = {
    "frechet": "Lower is better.",
    "recall": "Higher is better: how much of the real images' variety there is.",
}
COLUMNS = {"precision": "Precision", "recall": "Recall", "high_band_log_error": "High band's log error"}
FEWEST_SEEDS = 3
"""With fewer, a band reaches from the lowest to the highest seed: Student's interval of two would hide the lines."""


class GuidanceCurve(NamedTuple):
    """A group's rows at one number of steps."""

    group: Group
    steps: int
    rows: dict[float | None, list[Row]]
    """By guidance, one row per run."""

    @property
    def best(self) -> float | None:
        """The guidance with the least mean Fréchet distance; None: not known."""
        means = {scale: mean for scale, rows in self.rows.items() if (mean := _mean(rows, "frechet")) is not None}
        return min(means, key=lambda scale: means[scale]) if means else None


def point_charts(inputs: Inputs) -> list[Chart]:
    """For each setting and number of steps, Fréchet distance and recall over guidance, a line for each group."""
    charts = []
    found = _guidance_curves(inputs)
    told = told_apart(list(found))
    for setting, curves in found.items():
        for steps in sorted({curve.steps for curve in curves}, reverse=True):
            own = [curve for curve in curves if curve.steps == steps and None not in curve.rows]
            for metric, name in CURVES.items():
                lines = [line for curve in own if (line := _line(curve, metric)) is not None]
                if lines:
                    title = f"{name} over guidance, {steps} steps{told[setting]}"
                    charts.append(line_chart(title, DIRECTION[metric] + _band_note(own), lines, "guidance", name))
    return charts


def point_tables(inputs: Inputs) -> list[tuple[str, Table]]:
    """Arms against their baselines at their own best guidance, and all points, with captions."""
    tables = []
    for comparison in inputs.comparisons:
        rows = [_best_row(entry) for entry in comparison.content.get("at_best", [])]
        if rows:
            header = ["Arm", "Steps", "Guidance: baseline's → its own", "Fréchet, ratio", "95 % over seeds"]
            changes = [f"{COLUMNS[name]}, difference" for name in DIFFERENCES]
            tables.append(("Each at its own best guidance, against the baseline", Table([*header, *changes], rows)))
    found = _guidance_curves(inputs)
    told = told_apart(list(found))
    for setting, curves in found.items():
        header = ["Evaluation", "Steps", "Guidance", CURVES["frechet"], "95 %", *COLUMNS.values()]
        rows = [_point_row(curve, scale) for curve in curves for scale in curve.rows]
        tables.append((f"Every point{told[setting]}", Table(header, rows)))
    return tables


def _guidance_curves(inputs: Inputs) -> dict[Setting, list[GuidanceCurve]]:
    """Curves of evaluations at several points, by setting; for arms without evaluations, from the comparison."""
    found: dict[Setting, list[GuidanceCurve]] = {}
    for setting, drawn in by_setting(inputs.groups).items():
        for group, results in drawn:
            runs = [_rows_with_intervals(result) for result in results if result.content.get("points")]
            if curves := _by_steps(group, [row for run in runs for row in run], len(runs)):
                found.setdefault(setting, []).extend(curves)
    for comparison in inputs.comparisons:
        options = comparison.content.get("options") or {}
        samples, reference = options.get("num_samples"), str(options.get("reference_dir") or "–")
        for name, group in inputs.arms(comparison).items():
            rows = [row for row in comparison.content.get("rows", []) if row["arm"] == name]
            several = len({(row["guidance"], row["sampling_steps"]) for row in rows}) > 1
            if several and not any(result.content.get("points") for result in group.evals):
                without = {"interval": None, "recall_interval": None} | dict.fromkeys(COLUMNS)
                curves = _by_steps(group, [without | row for row in rows], len({row["seed"] for row in rows}))
                alike = SAMPLES not in group.redefined
                setting = Setting(samples, reference, None, None, "images", "–", "", alike)
                if curves:
                    found.setdefault(setting, []).extend(curves)
    return found


def _rows_with_intervals(result: Result) -> list[Row]:
    """The rows of an eval.json, each with the bootstrap intervals of its Fréchet distance and recall."""
    rows = rows_of(result.content)
    for row, point in zip(rows, result.content["points"], strict=True):
        name = frechet_of(point["metrics"])
        row["interval"] = None if name is None else point["metrics"][name].get("interval")
        row["recall_interval"] = point["metrics"].get("recall", {}).get("interval")
    return rows


def _by_steps(group: Group, rows: Sequence[Row], runs: int) -> list[GuidanceCurve]:
    """Curves by number of steps, with the points that all runs have."""
    found: dict[int, dict[float | None, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["sampling_steps"], {}).setdefault(row["guidance"], []).append(row)
    curves = []
    for steps in sorted(found, reverse=True):
        scales = sorted(found[steps], key=lambda scale: -1.0 if scale is None else scale)
        if whole := {scale: found[steps][scale] for scale in scales if len(found[steps][scale]) == runs}:
            curves.append(GuidanceCurve(group, steps, whole))
    return curves


def _mean(rows: Sequence[Row], metric: str) -> float | None:
    """The mean over runs; None: a run lacks it."""
    values = [row[metric] for row in rows]
    return None if None in values else fmean(values)


def _line(curve: GuidanceCurve, metric: str) -> Line | None:
    means = {scale: _mean(rows, metric) for scale, rows in curve.rows.items()}
    known = [scale for scale, mean in means.items() if scale is not None and mean is not None]
    if not known:
        return None
    bands = [_band(curve.rows[scale], metric) for scale in known]
    low, high = ([None if band is None else band[side] for band in bands] for side in (0, 1))
    return Line(curve.group.name, curve.group.slot, known, [means[s] for s in known], low, high, curve.best)


def _band(rows: Sequence[Row], metric: str) -> Sequence[float] | None:
    if len(rows) == 1:
        ends: Sequence[float] | None = rows[0]["interval" if metric == "frechet" else "recall_interval"]
        return ends
    values = [row[metric] for row in rows]
    return t_interval(values) if len(values) >= FEWEST_SEEDS else (min(values), max(values))


def _band_note(curves: Sequence[GuidanceCurve]) -> str:
    counts = {len(rows) for curve in curves for rows in curve.rows.values()}
    if counts == {1}:
        return " Bands: 95 % by the bootstrap over samples."
    few = max(counts) < FEWEST_SEEDS
    return f" Means over seeds; bands {'from the lowest to the highest' if few else 'of 95 % over seeds (t)'}."


def _point_row(curve: GuidanceCurve, scale: float | None) -> list[str]:
    rows = curve.rows[scale]
    told = "its own" if scale is None else plain(scale)
    best = " (best)" if scale == curve.best and len(curve.rows) > 1 else ""
    frechet, *others = (_mean(rows, name) for name in ("frechet", *COLUMNS))
    band = None if frechet is None or len(rows) == FEWEST_SEEDS - 1 else _band(rows, "frechet")
    return [curve.group.name, str(curve.steps), told + best, short(frechet, 4), bracketed(band), *map(short, others)]


def _best_row(entry: dict[str, Any]) -> list[str]:
    frechet = entry.get("frechet") or {"ratio": None, "interval": None}
    changes = [signed(entry[name]["difference"]) if name in entry else "–" for name in DIFFERENCES]
    numbers = [short(frechet["ratio"]), bracketed(frechet["interval"]), *changes]
    return [entry["arm"], str(entry["sampling_steps"]), best_scales(entry), *numbers]
