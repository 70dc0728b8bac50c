"""What evaluations measured: their metrics and spectra as charts, and a table of what was set against what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpl.evaluation.comparing import SAMPLES
from lpl.evaluation.intervals import mean, t_interval
from lpl.report.findings import metric_name
from lpl.report.plots import Chart, Line, Row, Table, interval_chart, line_chart
from lpl.report.sources import Group, Result, shortest_ends


class Against(NamedTuple):
    """The words for what samples are set against."""

    table: str
    reference: str
    floor: str
    spectrum: str
    """Of the floor, whose power it is."""


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
    """What figures depend on beside the model: only those of one setting are drawn on one axis."""

    samples: int | None
    reference: str
    images: int | None
    resolution: int | None
    against: str
    features: str
    digest: str
    """Of the reference's images; empty: not known, as of an older eval.json."""
    alike: bool
    """False: the arm's samples have another yardstick than the baseline's."""

    @property
    def words(self) -> Against:
        """For what samples are set against."""
        return AGAINST[self.against]


UNITS = {"samples": "{} samples", "images": "{} images", "resolution": "{} px", "features": "in {}"}
Drawn = list[tuple[Group, list[Result]]]


def evaluation_table(groups: Sequence[Group]) -> Table:
    """What was set against what, a row for each group and setting."""
    rows = []
    for setting, drawn in by_setting(groups).items():
        numbers = ["–" if n is None else f"{n:,}" for n in (setting.samples, setting.images)]
        pixels = "–" if setting.resolution is None else f"{setting.resolution} px"
        for group, results in drawn:
            models = list(dict.fromkeys(str(r.content.get("model", "–")) for r in results))
            model = models[0] + (f" and {len(models) - 1} more" if len(models) > 1 else "")
            told = [numbers[0], setting.reference, numbers[1], pixels, setting.words.table, setting.features]
            rows.append([group.name, model, *told])
    header = ["Evaluation", "Model", "Samples", "Reference", "Its images", "Resolution", "Against", "Features"]
    return Table(header, rows)


def metric_charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart for each metric and setting: every model's value with its interval, beside the floor."""
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
                    rows.append(_metric_row(group, known, setting.words.floor))
            if rows:
                note = f"{'Lower' if lower else 'Higher'} is better.{_told_notes(notes, len(drawn))}"
                if any(result.content.get("points") for _, results in drawn for result in results):
                    note += " Of several points of guidance and steps: the best guidance at the most steps."
                title = metric_name(name)
                charts.append(interval_chart(title + told[setting], note, rows, title))
    return charts


def refused_figures(groups: Sequence[Group]) -> list[str]:
    """Lines on the figures that evaluations name without a value."""
    metrics = [(name, m) for g in groups for e in g.evals for name, m in _metrics(e).items()]
    lines = [f"{metric_name(name)}: {m.get('note') or 'no value'}" for name, m in metrics if m.get("value") is None]
    return list(dict.fromkeys(lines))


def spectrum_charts(groups: Sequence[Group]) -> list[Chart]:
    """For each setting, power spectra of samples, reference and floor, and their ratio to the reference."""
    settings = by_setting(groups)
    told = told_apart(list(settings))
    return [chart for setting, drawn in settings.items() for chart in _spectra(setting, drawn, told[setting])]


def _spectra(setting: Setting, drawn: Drawn, told: str) -> list[Chart]:
    words, lines, ratios = setting.words, list[Line](), list[Line]()
    for group, results in drawn:
        spectra = [r.content["spectrum"] for r in results if r.content.get("spectrum")]
        if not spectra:
            continue
        first = spectra[0]
        spectra = [s for s in spectra if s["frequency"] == first["frequency"]]
        x = first["frequency"]
        power = [mean(values) for values in zip(*(s["samples"] for s in spectra), strict=True)]
        if not lines:
            lines.append(Line(words.reference, "ink", x, first["reference"]))
            if first.get("floor"):
                lines.append(Line(words.spectrum, "floor", x, first["floor"]))
                ratios.append(Line(words.spectrum, "floor", x, _ratio(first["floor"], first["reference"])))
        lines.append(Line(group.name, group.slot, x, power))
        ratios.append(Line(group.name, group.slot, x, _ratio(power, first["reference"])))
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


def _metrics(result: Result) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = result.content.get("metrics", {})
    return found


def by_setting(groups: Sequence[Group]) -> dict[Setting, Drawn]:
    """The evaluations of each setting, by group. References of one content go by the name of the first."""
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
                SAMPLES not in group.yardsticks,
            )
            found.setdefault(setting, {}).setdefault(group.name, (group, []))[1].append(result)
    return {setting: list(drawn.values()) for setting, drawn in found.items()}


def told_apart(settings: Sequence[Setting]) -> dict[Setting, str]:
    """What titles say of a setting: the parts in which settings differ."""
    differs = [name for name in Setting._fields if len({getattr(s, name) for s in settings}) > 1]
    if not differs:
        return dict.fromkeys(settings, "")
    ends = dict(zip((s.reference for s in settings), shortest_ends([Path(s.reference) for s in settings]), strict=True))
    found = {}
    for setting in settings:
        parts = []
        for name in differs:
            value = getattr(setting, name)
            if name == "reference":
                parts.append(f"reference {ends[value]}")
            elif name == "against":
                parts.append(f"against {value}")
            elif name == "digest":
                several = len({s.digest for s in settings if s.reference == setting.reference}) > 1
                parts += [f"its images {value[:6] or 'unknown'}"] if several else []
            elif name == "alike":
                parts += [] if value else ["another yardstick"]
            elif value is not None:
                parts.append(UNITS[name].format(value))
        found[setting] = f" ({', '.join(parts)})" if parts else ""
    return found


def _told_notes(notes: Sequence[tuple[str, str]], groups: int) -> str:
    """Each note once, with the models it is of, unless it is of all."""
    by_note: dict[str, dict[str, None]] = {}
    for name, note in notes:
        by_note.setdefault(note, {})[name] = None
    told = [note if len(names) == groups else f"{', '.join(names)}: {note}" for note, names in by_note.items()]
    return "".join(f" {text[0].upper()}{text[1:]}." for text in told)


def _metric_row(group: Group, found: Sequence[dict[str, Any]], floor: str) -> Row:
    """A group's value; with evaluations of several runs their mean, with Student's t interval over the runs."""
    values = [float(m["value"]) for m in found]
    interval = t_interval(values) if len(values) > 1 else found[0].get("interval")
    low, high = interval or (None, None)
    floors = [m["floor"] for m in found if m.get("floor") is not None]
    points = values if len(values) > 1 else ()
    mark = floors[0] if floors else None
    return Row(group.name, group.slot, mean(values), low, high, points=points, mark=mark, mark_is=floor)
