"""The page's charts for a paper: vector files of a column's width, with fonts and colours inside."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lpl.report.charts import Chart, IntervalPlot, LinePlot

FORMATS = ("svg", "pdf")
WIDTH, HEIGHT, ROW = 3.4, 2.3, 0.32
"""Size of a figure, and height of a row, in inches."""
STYLE: Any = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # matplotlib's own: the same on every machine
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lpl",
    "pdf.fonttype": 42,
}
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Metadata without dates, so that the same figures give the same files."""


def draw(chart: Chart) -> dict[str, bytes]:
    """A chart as a file of each format, without its title and note, which are for the caption."""
    with matplotlib.rc_context(STYLE):
        drawn = chart.drawn
        figure = _lines(drawn) if isinstance(drawn, LinePlot) else _intervals(drawn)
        made = {}
        for kind in FORMATS:
            content = io.BytesIO()
            figure.savefig(content, format=kind, metadata=UNDATED[kind] | {"Title": chart.title}, bbox_inches="tight")
            made[kind] = content.getvalue()
    return made


def _lines(plot: LinePlot) -> Figure:
    figure = Figure((WIDTH, HEIGHT))
    axes = figure.subplots()
    colors, dashes = page_colors(), _page_dashes()
    for line in plot.lines:
        color, dash = colors[line.slot], (0, dashes[line.slot]) if line.slot in dashes else "-"
        y = _numbers(line.y)
        marker = "o" if len(line.x) <= 16 else ""
        axes.plot(line.x, y, color=color, linestyle=dash, marker=marker, markersize=2.5, label=_plain(line.label))
        if line.low is not None and line.high is not None:
            low, high = _numbers(line.low), _numbers(line.high)
            axes.fill_between(line.x, low, high, color=color, alpha=0.18, linewidth=0)
        if line.best is not None and line.best in line.x:
            at = list(line.x).index(line.best)
            axes.plot(line.x[at], y[at], "o", markersize=7, markerfacecolor="none", markeredgecolor=color)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    elif plot.zero:
        bottom, top = map(float, axes.get_ylim())
        axes.set_ylim(min(0.0, bottom), max(0.0, top))
    axes.set_xlabel(_plain(plot.x_label))
    axes.set_ylabel(_plain(plot.y_label))
    if plot.lines:
        axes.legend()
    return figure


def _intervals(plot: IntervalPlot) -> Figure:
    figure = Figure((WIDTH, 0.6 + ROW * max(1, len(plot.rows))))
    axes = figure.subplots()
    colors = page_colors()
    for place, row in enumerate(plot.rows):
        color = colors[row.slot]
        if row.noise is not None:
            axes.barh(place, 2 * row.noise, left=-row.noise, height=0.5, color="0.88", zorder=1)
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], "|-", color=color, markersize=5)
        axes.plot(row.points, [place] * len(row.points), "o", color=color, markersize=2.5, alpha=0.5)
        axes.plot(row.value, place, "o", color=color, markersize=4)
        if row.mark is not None:
            axes.plot([row.mark, row.mark], [place - 0.25, place + 0.25], color=colors["ink"], linewidth=1.5)
    if plot.zero:
        axes.axvline(0, color=colors["ink"], linewidth=0.8)
    axes.set_yticks(range(len(plot.rows)), [_plain(row.label) for row in plot.rows])
    axes.set_ylim(len(plot.rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_xlabel(_plain(plot.x_label))
    return figure


def page_colors() -> dict[str, str]:
    """The page's colours on white, by slot."""
    light = _style().split("@media", 1)[0]
    found = dict(re.findall(r"--s(\d): (#\w+)", light))
    soft = dict(re.findall(r"--(soft): (#\w+)", light))["soft"]
    return found | {"ink": soft, "floor": soft}


def _page_dashes() -> dict[str, tuple[float, ...]]:
    found = re.findall(r"\.line\.s(\w+) \{[^}]*stroke-dasharray: ([\d. ]+)", _style())
    return {slot: tuple(float(part) / 3 for part in dashes.split()) for slot, dashes in found}


def _style() -> str:
    return files("lpl.report").joinpath("template", "style.css").read_text(encoding="utf-8")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _plain(text: str) -> str:
    """A user's text, escaped: matplotlib reads $ as a formula, and hides labels that begin with _ in the legend."""
    text = text.replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text
