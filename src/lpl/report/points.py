"""What evaluations found over guidance, a panel for each number of sampling steps, and tables of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lpl.config.points import frechet_of, plain
from lpl.evaluation.comparing import DIFFERENCES, SAMPLES, rows_of
from lpl.evaluation.intervals import mean, t_interval
from lpl.report.evaluations import Setting, by_setting, told_apart
from lpl.report.findings import best_scales, signed
from lpl.report.plots import Chart, Line, Table, line_chart
from lpl.report.scales import short
from lpl.report.sources import Group, Inputs, Result

Row = dict[str, Any]
FIGURES = {"frechet": "Fréchet distance", "recall": "Recall"}
DIRECTION = {
    "frechet": "Lower is better.",
    "recall": "Higher is better: how much of the real images' variety there is.",
}
COLUMNS = {"precision": "Precision", "recall": "Recall", "high_band_log_error": "High band's log error"}
FEWEST_SEEDS = 3
"""Below, a band reaches from the lowest to the highest seed: Student's interval of two would hide the lines."""


class Place(NamedTuple):
    """A group's rows at one number of steps."""

    group: Group
    steps: int
    rows: dict[float | None, list[Row]]
    """By guidance, one of each run."""

    @property
    def best(self) -> float | None:
        """The guidance with the least mean Fréchet distance; None: not known."""
        known = {scale: rows for scale, rows in self.rows.items() if all(row["frechet"] is not None for row in rows)}
        return min(known, key=lambda scale: mean([row["frechet"] for row in known[scale]])) if known else None


def point_charts(inputs: Inputs) -> list[Chart]:
    """For each setting and number of steps, Fréchet distance and recall over guidance, a line for each group."""
    charts = []
    found = _places(inputs)
    told = told_apart(list(found))
    for setting, places in found.items():
        for steps in sorted({place.steps for place in places}, reverse=True):
            own = [place for place in places if place.steps == steps and None not in place.rows]
            for figure, name in FIGURES.items():
                lines = [line for place in own if (line := _line(place, figure)) is not None]
                if lines:
                    title = f"{name} over guidance, {steps} steps{told[setting]}"
                    note = f"{DIRECTION[figure]}{_band_note(own)}"
                    charts.append(line_chart(title, note, lines, "guidance", name))
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
    found = _places(inputs)
    told = told_apart(list(found))
    for setting, places in found.items():
        header = ["Evaluation", "Steps", "Guidance", FIGURES["frechet"], "95 %", *COLUMNS.values()]
        rows = [_row(place, scale) for place in places for scale in place.rows]
        tables.append((f"Every point{told[setting]}", Table(header, rows)))
    return tables


def _places(inputs: Inputs) -> dict[Setting, list[Place]]:
    """What was measured at several points, by setting."""
    found: dict[Setting, list[Place]] = {}
    for setting, drawn in by_setting(inputs.groups).items():
        for group, results in drawn:
            runs = [_with_intervals(result) for result in results if result.content.get("points")]
            places = _by_steps(group, [row for run in runs for row in run], len(runs))
            if places:
                found.setdefault(setting, []).extend(places)
    for comparison in inputs.comparisons:
        for name, group in inputs.arms(comparison).items():
            if not any(result.content.get("points") for result in group.evals):
                places = _of_comparison(comparison, name, group)
                if places:
                    found.setdefault(_setting_of(comparison, group), []).extend(places)
    return found


def _of_comparison(comparison: Result, arm: str, group: Group) -> list[Place]:
    """The points of an arm whose evaluations are gone, where there are several."""
    rows = [row for row in comparison.content.get("rows", []) if row["arm"] == arm]
    several = len({(row["guidance"], row["sampling_steps"]) for row in rows}) > 1
    without = {"interval": None, "recall_interval": None} | dict.fromkeys(COLUMNS)
    return _by_steps(group, [without | row for row in rows], len({row["seed"] for row in rows})) if several else []


def _setting_of(comparison: Result, group: Group) -> Setting:
    options = comparison.content.get("options") or {}
    samples, reference = options.get("num_samples"), str(options.get("reference_dir") or "–")
    return Setting(samples, reference, None, None, "images", "–", "", SAMPLES not in group.yardsticks)


def _with_intervals(result: Result) -> list[Row]:
    """The rows of an eval.json, each with its Fréchet distance's bootstrap interval."""
    rows = rows_of(result.content)
    for row, point in zip(rows, result.content["points"], strict=True):
        name = frechet_of(point["metrics"])
        row["interval"] = None if name is None else point["metrics"][name].get("interval")
        row["recall_interval"] = point["metrics"].get("recall", {}).get("interval")
    return rows


def _by_steps(group: Group, rows: Sequence[Row], runs: int) -> list[Place]:
    """Points that all runs have."""
    found: dict[int, dict[float | None, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["sampling_steps"], {}).setdefault(row["guidance"], []).append(row)
    places = []
    for steps in sorted(found, reverse=True):
        whole = {scale: own for scale, own in found[steps].items() if len(own) == runs}
        scales = sorted(whole, key=lambda scale: -1.0 if scale is None else scale)
        if scales:
            places.append(Place(group, steps, {scale: whole[scale] for scale in scales}))
    return places


def _line(place: Place, figure: str) -> Line | None:
    known = {
        scale: rows
        for scale, rows in place.rows.items()
        if scale is not None and all(row[figure] is not None for row in rows)
    }
    if not known:
        return None
    bands = [_band(rows, figure) for rows in known.values()]
    low, high = ([None if band is None else band[side] for band in bands] for side in (0, 1))
    y = [mean([row[figure] for row in rows]) for rows in known.values()]
    return Line(place.group.name, place.group.slot, list(known), y, low, high, place.best)


def _band(rows: Sequence[Row], figure: str) -> Sequence[float] | None:
    if len(rows) == 1:
        ends: Sequence[float] | None = rows[0]["interval" if figure == "frechet" else "recall_interval"]
        return ends
    values = [row[figure] for row in rows]
    return t_interval(values) if len(values) >= FEWEST_SEEDS else (min(values), max(values))


def _band_note(places: Sequence[Place]) -> str:
    counts = {len(rows) for place in places for rows in place.rows.values()}
    if counts == {1}:
        return " Bands: 95 % by the bootstrap over samples."
    few = max(counts) < FEWEST_SEEDS
    return f" Means over seeds; bands {'from the lowest to the highest' if few else 'of 95 % over seeds (t)'}."


def _row(place: Place, scale: float | None) -> list[str]:
    rows = place.rows[scale]
    told = "its own" if scale is None else plain(scale)
    best = " (best)" if scale == place.best and len(place.rows) > 1 else ""
    values = [row["frechet"] for row in rows]
    band = None if None in values else _band(rows, "frechet") if len(rows) != FEWEST_SEEDS - 1 else None
    shown = [
        None if any(row[name] is None for row in rows) else mean([row[name] for row in rows])
        for name in ("frechet", *COLUMNS)
    ]
    ends = "–" if band is None else f"[{short(band[0])}, {short(band[1])}]"
    return [place.group.name, str(place.steps), told + best, short(shown[0], 4), ends, *map(short, shown[1:])]


def _best_row(entry: dict[str, Any]) -> list[str]:
    frechet = entry.get("frechet") or {"ratio": None, "interval": None}
    ends = frechet["interval"]
    interval = "–" if ends is None else f"[{short(ends[0])}, {short(ends[1])}]"
    changes = [signed(entry[name]["difference"]) if name in entry else "–" for name in DIFFERENCES]
    return [
        entry["arm"],
        str(entry["sampling_steps"]),
        best_scales(entry),
        short(frechet["ratio"]),
        interval,
        *changes,
    ]
