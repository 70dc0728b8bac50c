"""Charts of logged values and validation over a run: losses, also by timestep bin, and LPL's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lpl.report.charts import Chart, Line
from lpl.report.plots import line_chart
from lpl.report.runs import RunFolder, interpolate, training_clock
from lpl.report.sources import Group

LOSSES = {"diffusion_loss": "Diffusion loss", "lpl": "LPL"}
STEPS = "optimizer steps"
UNITS = ((2 * 3600.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))
"""(seconds from which a unit is used, seconds per unit, unit)."""
SHARES = (
    (
        "lpl/gradient_share",
        "LPL's share of the gradient",
        "LPL's part of the gradient at the denoiser's output. Below 5 % it idles; above 80 % it dominates.",
    ),
    ("lpl/loss_share", "LPL's share of the loss", "LPL's weighted part of the training loss."),
)
Points = list[tuple[float, float | None]]


def loss_charts(groups: Sequence[Group]) -> list[Chart]:
    """Validation losses over steps and training time, by timestep bin at the end, and the training loss over steps."""
    groups = [group for group in groups if group.runs]
    charts = []
    for name, title in LOSSES.items():
        alike = [g for g in groups if name not in g.redefined]
        changes = _change_lines(alike, name)
        if changes:
            note = f"Against the model before training, on held-out images.{_band_note(alike)} Lower is better."
            charts += _over_both(f"{title}, validation: change", note, changes, "%")
        elif found := _validation_lines(alike, name):
            note = f"On held-out images, noise and timesteps always the same.{_band_note(alike)} Lower is better."
            charts += _over_both(f"{title}, validation", note, found, title)
    for name, title in LOSSES.items():
        charts += _bin_charts(groups, name, title)
    if lines := _scalar_lines(groups, "train_loss"):
        note = f"The whole loss on training samples: noisy, as timesteps vary. Lower is better.{_band_note(groups)}"
        charts.append(line_chart("Training loss", note, lines, STEPS, "loss"))
    return charts


def share_charts(groups: Sequence[Group]) -> list[Chart]:
    """LPL's shares of gradient and loss, and its distance layer by layer for a single run."""
    groups = [group for group in groups if group.runs]
    charts = []
    for tag, title, note in SHARES:
        if lines := _scalar_lines(groups, tag, 100.0):
            charts.append(line_chart(title, note + _band_note(groups), lines, STEPS, "%", zero=True))
    with_lpl = [g for g in groups if any(v > 0 for _, v in g.runs[0].scalars.get("lpl/weight", []))]
    if len(with_lpl) == 1:
        note = f"Distance of the decoder's features by layer, from the coarsest to the finest, in {with_lpl[0].name}."
        if lines := _layer_lines(with_lpl[0].runs[0]):
            charts.append(line_chart("LPL by layer", note, lines, STEPS, "distance", log_y=True))
    return charts


def final_kind(run: RunFolder) -> str | None:
    """The weights whose validation counts: those of the result, else averaged ones if any."""
    kinds = _kinds(run)
    return run.final_weights if run.final_weights in kinds else (kinds[-1] if kinds else None)


def _kinds(run: RunFolder) -> list[str]:
    return list(dict.fromkeys(row["weights"] for row in run.validation))


def validation_rows(run: RunFolder, kind: str | None) -> list[dict[str, Any]]:
    """Validation rows of one kind of weights, by step."""
    return [row for row in run.validation if row["weights"] == kind]


def _over_both(title: str, note: str, lines: Sequence[tuple[Group, Line]], y_label: str) -> list[Chart]:
    """A chart over steps, and the same over training time if known."""
    charts = [line_chart(title, note, [line for _, line in lines], STEPS, y_label)]
    timed = [line for line in (_over_seconds(group, line) for group, line in lines) if line.x]
    if timed:
        longest = max(x for line in timed for x in line.x)
        length, unit = next((length, unit) for least, length, unit in UNITS if longest >= least)
        timed = [line._replace(x=[x / length for x in line.x]) for line in timed]
        note += " Training alone, without validation, checkpoints and pauses."
        charts.append(line_chart(f"{title}, over training time", note, timed, f"training time, {unit}", y_label))
    return charts


def _over_seconds(group: Group, line: Line) -> Line:
    """A group's line over steps, drawn over seconds of training: the mean over its runs, as far as all have them."""
    clocks = [training_clock(run) for run in group.runs]
    if any(len(clock) < 2 for clock in clocks):
        return line._replace(x=[], y=[], low=None, high=None)
    known = [[interpolate(clock, step) for clock in clocks] for step in line.x]
    times = [None if None in each else sum(s for s in each if s is not None) / len(each) for each in known]
    kept = [i for i, seconds in enumerate(times) if seconds is not None]
    y, low, high = ([part[i] for i in kept] if part else None for part in (line.y, line.low, line.high))
    return Line(line.label, line.slot, [s for s in times if s is not None], y or [], low, high)


def _validation_lines(groups: Sequence[Group], name: str) -> list[tuple[Group, Line]]:
    if len(groups) == 1 and len(groups[0].runs) == 1:
        run = groups[0].runs[0]
        told = {"raw": "weights as trained (raw)", "ema": "averaged weights (ema)"}
        lines = [
            (groups[0], _over([_curve(run, kind, name)], told.get(kind, kind), str(i + 1)))
            for i, kind in enumerate(_kinds(run))
        ]
    else:
        lines = [(group, _over(_final_curves(group, name), group.name, group.slot)) for group in groups]
    return [(group, line) for group, line in lines if any(value is not None for value in line.y)]


def _change_lines(groups: Sequence[Group], name: str) -> list[tuple[Group, Line]]:
    """Changes in per cent of each run's start, if arms have several seeds (with other validation draws); else none."""
    lines: list[tuple[Group, Line]] = []
    if all(len(group.runs) < 2 for group in groups):
        return lines
    for group in groups:
        runs = [[(step, value) for step, value in points if value is not None] for points in _final_curves(group, name)]
        if not all(points and points[0][0] == 0 and points[0][1] for points in runs):
            return []
        found: list[Points] = [[(x, 100 * (y / points[0][1] - 1)) for x, y in points] for points in runs]
        lines.append((group, _over(found, group.name, group.slot)))
    return lines


def _final_curves(group: Group, name: str) -> list[Points]:
    """A validation loss over steps for every run, of the weights that count."""
    return [_curve(run, final_kind(run), name) for run in group.runs]


def _curve(run: RunFolder, kind: str | None, name: str) -> Points:
    return [(row["step"], row.get(name)) for row in validation_rows(run, kind)]


def _bin_charts(groups: Sequence[Group], name: str, title: str) -> list[Chart]:
    """Losses by timestep bin at the end, and their changes against the baseline for each comparison.

    Runs without a comparison are compared with the first of them, a single run with its start. Arms whose loss is
    defined otherwise than the baseline's are left out.
    """
    groups = [group for group in groups if name not in group.redefined]
    lines = [_over(ends, g.name, g.slot) for g in groups if (ends := _bins(g.runs, name, -1))]
    starts = _bins(groups[0].runs, name, 0) if groups else []
    first = [_over(starts, "before training", "ink")._replace(low=None, high=None)] if starts else []
    if not lines:
        return []
    note = f"By noise level at the end of training.{_band_note(groups)} Lower is better."
    charts = [line_chart(f"{title} by timestep bin", note, [*first, *lines], "timestep", title, log_y=True)]
    compared = [[g for g in groups if g.comparison == which] for which in dict.fromkeys(g.comparison for g in groups)]
    for own in compared:
        against, changes = _bin_changes(own, name)
        if changes:
            note = f"Difference to {against}, at each noise level.{_band_note(own)} Below 0 is better."
            told = f"{title}: change by timestep bin" + (f", against {against}" if len(compared) > 1 else "")
            charts.append(line_chart(told, note, changes, "timestep", "%", zero=True))
    return charts


def _bin_changes(groups: Sequence[Group], name: str) -> tuple[str, list[Line]]:
    """The name of the reference for runs of one comparison, or of none, and the changes to it in per cent."""
    ends = {g.name: _bins(g.runs, name, -1) for g in groups}
    baseline = next((g for g in groups if g.baseline), groups[0])
    reference, against = ends[baseline.name], baseline.name
    if len(groups) == 1 or not reference:
        reference, against = _bins(groups[0].runs, name, 0), "before training"
    changed = [g for g in groups if ends[g.name] and reference and g.name != against]
    return against, [_over(_changes(ends[g.name], reference), g.name, g.slot) for g in changed]


def _bins(runs: Sequence[RunFolder], name: str, place: int) -> list[Points]:
    found = []
    for run in runs:
        rows = [row for row in validation_rows(run, final_kind(run)) if row.get(f"{name}_bins")]
        if rows:
            middles = [(a + b) / 2 for a, b in pairwise(rows[place]["edges"])]
            found.append(list(zip(middles, rows[place][f"{name}_bins"], strict=True)))
    return found


def _changes(ends: Sequence[Points], reference: Sequence[Points]) -> list[Points]:
    """Changes in per cent: each run against the reference's run at the same position, or its first."""
    found = []
    for place, points in enumerate(ends):
        base = dict(reference[place if len(reference) == len(ends) else 0])
        found.append([(x, 100 * (y / b - 1) if y is not None and (b := base.get(x)) else None) for x, y in points])
    return found


def _scalar_lines(groups: Sequence[Group], tag: str, factor: float = 1.0) -> list[Line]:
    lines = []
    for group in groups:
        found: list[Points] = [
            [(step, factor * value) for step, value in run.scalars[tag]] for run in group.runs if tag in run.scalars
        ]
        if found:
            lines.append(_over(found, group.name, group.slot))
    return lines


def _layer_lines(run: RunFolder) -> list[Line]:
    tags = sorted(tag for tag in run.scalars if tag.startswith("lpl/features/") and tag.endswith("/distance"))
    names = [tag.split("/")[2].replace("_", " ") for tag in tags]
    layers: list[Points] = [list(run.scalars[tag]) for tag in tags]
    return [_over([points], name, str(i % 8 + 1)) for i, (name, points) in enumerate(zip(names, layers, strict=True))]


def _over(runs: Sequence[Points], label: str, slot: str) -> Line:
    """The mean over runs where all of them have a value, with a band from the smallest to the largest."""
    tables = [dict(points) for points in runs]
    x = sorted(set.intersection(*(set(table) for table in tables))) if tables else []

    def each(of: Callable[[list[float]], float]) -> list[float | None]:
        values = [[table[place] for table in tables] for place in x]
        return [of([v for v in found if v is not None]) if None not in found else None for found in values]

    mean = each(lambda values: sum(values) / len(values))
    return Line(label, slot, x, mean, each(min), each(max)) if len(runs) > 1 else Line(label, slot, x, mean)


def _band_note(groups: Sequence[Group]) -> str:
    told = " Lines are means over seeds, bands reach from the lowest to the highest."
    return told if any(len(group.runs) > 1 for group in groups) else ""
