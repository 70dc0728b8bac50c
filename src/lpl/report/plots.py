"""Plots of the page as SVG: lines over an axis, and values with intervals, a row each."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from lpl.base.terminal import printable
from lpl.report.charts import Chart, IntervalPlot, IntervalRow, Line, LinePlot
from lpl.report.numbers import short

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 24, 42
MOST_POINTS = 240
MARKED = 16
"""Lines with at most so many points have a mark at each."""
ROW, BAR = 38, 26
"""Height of a row, and the interval's vertical position in it."""
_number = count(1)


def line_chart(
    title: str,
    note: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
) -> Chart:
    """A plot of lines.

    Args:
        title: of the plot.
        note: what it shows, a sentence.
        lines: in the order of the legend; what is not finite, or not above 0 on a logarithmic axis, is left out.
        x_label, y_label: of the axes, with units.
        log_x, log_y: logarithmic axes.
        zero: the vertical axis begins at 0.
    """
    drawn = LinePlot([_usable(line, log_x, log_y) for line in lines], x_label, y_label, log_x, log_y, zero)
    lines = [_usable(_thinned(line), log_x, log_y) for line in lines]
    across = [x for line in lines for x in line.x]
    along = [v for line in lines for part in (line.y, line.low or (), line.high or ()) for v in part if v is not None]
    x_scale = scale_for(across, LEFT, WIDTH - RIGHT, log_x)
    y_scale = scale_for(along, HEIGHT - BOTTOM, TOP, log_y, zero and not log_y)
    parts = [_axes(x_scale, y_scale, x_label, y_label)]
    parts += [_band(line, x_scale, y_scale) for line in lines]
    parts += [_line(line, x_scale, y_scale) for line in lines]
    said = "; ".join(filter(None, (_in_words(line) for line in lines)))
    svg = _svg(title, f"{note} {y_label} against {x_label}. {said}.", HEIGHT, "".join(parts))
    places = sorted(set(across))
    every = -(-len(places) // 40) or 1
    by_line = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    marks_best = any(line.best is not None for line in lines)
    return Chart(
        title,
        note,
        svg,
        [(line.label, line.slot) for line in lines],
        [x_label, *(line.label for line in lines)],
        [[short(x, 4), *(short(values.get(x), 4) for values in by_line)] for x in places[::every]],
        f"every {every}. point" if every > 1 else "",
        drawn,
        [("swatch-best", "the best guidance by Fréchet distance")] if marks_best else [],
    )


def interval_chart(
    title: str, note: str, rows: Sequence[IntervalRow], x_label: str, zero: bool = False, value_header: str = "value"
) -> Chart:
    """A plot of values with intervals, a row each.

    Args:
        title: of the plot.
        note: what it shows, a sentence.
        rows: from top to bottom.
        x_label: of the axis, with units.
        zero: draw a line at 0, which the axis then includes.
        value_header: header of the column of values in the table.
    """
    held = [v for row in rows for v in (row.value, row.low, row.high, *row.points) if v is not None]
    held += [s * row.noise for row in rows if row.noise is not None for s in (-1, 1)]
    held = [v for v in [*held, *([0.0] if zero else [])] if math.isfinite(v)]
    around = max(held) - min(held) if held else 0.0
    held += [row.mark for row in rows if row.mark is not None and min(held) - around < row.mark < max(held) + around]
    height = ROW * len(rows) + BOTTOM
    x_scale = scale_for(held, 10, WIDTH - RIGHT)
    parts = []
    for tick, label in x_scale.labels(6):
        x = x_scale(tick)
        lines = "".join(f"M{x:.1f} {ROW * number + BAR - 10}v20" for number in range(len(rows)))
        parts.append(f'<path class="{"zero" if zero and tick == 0 else "grid"}" d="{lines}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{label}</text>')
    for number, row in enumerate(rows):
        shows_mark = number == 0 or row.mark != rows[number - 1].mark
        parts.append(_row(row, ROW * number, x_scale, shows_mark))
    parts.append(f'<text class="axis" x="{WIDTH / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    said = "; ".join(f"{row.label}: {row.numbers}" for row in rows)
    svg = _svg(title, f"{note} {said}.", height, "".join(parts), "rows")
    header, key = ["", value_header, "95 % interval"], []
    table = [[row.label, short(row.value, 4), row.interval] for row in rows]
    if noises := ", or ".join(dict.fromkeys(row.noise_is for row in rows if row.noise is not None)):
        header.append("noise")
        key.append(("swatch-noise", f"noise: {noises}"))
        table = [[*cells, short(row.noise)] for cells, row in zip(table, rows, strict=True)]
    if marks := ", or ".join(dict.fromkeys(row.mark_is for row in rows if row.mark is not None)):
        header.append("floor")
        key.append(("swatch-mark", f"{marks} (◂ ▸: beyond the axis)"))
        table = [[*cells, short(row.mark)] for cells, row in zip(table, rows, strict=True)]
    return Chart(title, note, svg, [], header, table, "", IntervalPlot(rows, x_label, zero), key)


def escape(text: str) -> str:
    """A text as markup; characters that would change the direction of the text around it become escapes."""
    return html.escape(printable(text))


def _svg(title: str, description: str, height: float, content: str, kind: str = "lines") -> str:
    number = next(_number)
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="t{number} d{number}">'
        f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(description)}</desc>{content}</svg>'
    )


def _axes(x_scale: Scale, y_scale: Scale, x_label: str, y_label: str) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick, label in y_scale.labels(5):
        y = y_scale(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in x_scale.labels(6):
        x = x_scale(tick)
        parts.append(f'<path class="base" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="base" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>')
    # Above the axis, not along it: turned text is hard to read.
    parts.append(f'<text class="axis" x="4" y="12">{escape(y_label)}</text>')
    return "".join(parts)


def _line(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    path, marks, drawn = [], [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            drawn = False
            continue
        a, b = f"{x_scale(x):.1f}", f"{y_scale(y):.1f}"
        path.append(f"{'L' if drawn else 'M'}{a} {b}")
        drawn = True
        if len(line.x) <= MARKED:
            told = escape(f"{line.label}: {short(y, 4)} at {short(x, 4)}")
            marks.append(f'<circle class="dot s{line.slot}" cx="{a}" cy="{b}" r="3"><title>{told}</title></circle>')
            if x == line.best:
                marks.append(f'<circle class="best s{line.slot}" cx="{a}" cy="{b}" r="7"/>')
    name = f"<title>{escape(line.label)}</title>"
    return f'<path class="line s{line.slot}" d="{"".join(path)}">{name}</path>{"".join(marks)}' if path else ""


def _band(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    ends = zip(line.x, line.low or [], line.high or [], strict=True) if line.low and line.high else ()
    edges = [(x_scale(x), y_scale(low), y_scale(high)) for x, low, high in ends if low is not None and high is not None]
    if len(edges) == 1:
        [(x, low, high)] = edges
        return f'<path class="whisker s{line.slot}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    if not edges:
        return ""
    outline = [f"{x:.1f} {high:.1f}" for x, _, high in edges] + [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(edges)]
    return f'<path class="band s{line.slot}" d="M{"L".join(outline)}Z"/>'


def _row(row: IntervalRow, top: float, scale: Scale, shows_mark: bool) -> str:
    y, right, parts = top + BAR, WIDTH - RIGHT, []
    if row.noise is not None:
        a, b = scale(-row.noise), scale(row.noise)
        parts.append(f'<rect class="noise" x="{a:.1f}" y="{y - 8}" width="{b - a:.1f}" height="16"/>')
    label = row.label if len(row.label) <= 38 else row.label[:37] + "…"
    parts.append(f'<text class="label" x="10" y="{top + 12}">{escape(label)}</text>')
    parts.append(f'<text class="value" x="{right}" y="{top + 12}" text-anchor="end">{escape(row.numbers)}</text>')
    if row.low is not None and row.high is not None:
        a, b = scale(row.low), scale(row.high)
        whisker = f"M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}v10M{b:.1f} {y - 5}v10"
        parts.append(f'<path class="whisker s{row.slot}" d="{whisker}"/>')
    parts += [f'<circle class="point s{row.slot}" cx="{scale(v):.1f}" cy="{y}" r="2.5"/>' for v in row.points]
    parts.append(f'<circle class="dot s{row.slot}" cx="{scale(row.value):.1f}" cy="{y}" r="4.5"/>')
    if row.mark is not None and scale.low <= row.mark <= scale.high:
        parts.append(f'<path class="mark" d="M{scale(row.mark):.1f} {y - 9}v18"/>')
    elif row.mark is not None and shows_mark:
        x, anchor, text = (10, "start", f"◂ {short(row.mark)}")
        if row.mark > scale.high:
            x, anchor, text = (right, "end", f"{short(row.mark)} ▸")
        parts.append(f'<text class="label" x="{x}" y="{y + 4}" text-anchor="{anchor}">{text}</text>')
    return f"<g><title>{escape(f'{row.label}: {row.numbers}')}</title>{''.join(parts)}</g>"


def _in_words(line: Line) -> str:
    known = [f"{short(y)} at {short(x, 4)}" for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if len(known) > 1:
        return f"{line.label}: from {known[0]} to {known[-1]}"
    return f"{line.label}: {known[0]}" if known else ""


def _usable(line: Line, log_x: bool, log_y: bool) -> Line:
    def fits(value: float | None, log: bool) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not log)

    kept = [i for i, x in enumerate(line.x) if fits(x, log_x)]
    parts = [None if part is None else [part[i] if fits(part[i], log_y) else None for i in kept] for part in line[3:6]]
    return line._replace(x=[line.x[i] for i in kept], y=parts[0] or [], low=parts[1], high=parts[2])


def _thinned(line: Line) -> Line:
    """Means of neighbouring points, at most MOST_POINTS of them; nothing changes below that."""
    size = -(-len(line.x) // MOST_POINTS)
    if size <= 1:
        return line

    def means(values: Sequence[float | None] | None) -> list[float | None] | None:
        if values is None:
            return None
        groups = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
        return [sum(group) / len(group) if group else None for group in groups]

    x = [value for value in means(line.x) or [] if value is not None]
    return line._replace(x=x, y=means(line.y) or [], low=means(line.low), high=means(line.high))


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to places [start, end], linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, number: int) -> list[float]:
        """Round values within the scale, about `number` of them."""
        low, high = self.low, self.high
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            whole = [10.0**d for d in decades if low <= 10.0**d <= high]
            some = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
            if len(whole) >= 3:
                return whole[:: -(-len(whole) // max(2, number))]
            if len(some) >= 2:
                return some
        raw = (high - low) / max(1, number)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
        return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    def labels(self, number: int) -> list[tuple[float, str]]:
        """Ticks with their texts, of as few digits as tell them apart."""
        ticks = self.ticks(number)
        for digits in range(2, 7):
            labels = [short(tick, digits) for tick in ticks]
            if len(set(labels)) == len(ticks):
                break
        return list(zip(ticks, labels, strict=True))


def scale_for(values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
    """A scale that holds all values, with a margin of 4 %.

    Args:
        values: finite; above 0 with log.
        start, end: places of its ends.
        log: logarithmic.
        zero: include 0.
    """
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.5
        return Scale(low / margin, high * margin, start, end, True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            return Scale(0.0, 1.0, start, end)
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - margin, high if zero and high == 0 else high + margin, start, end)
