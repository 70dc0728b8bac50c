"""What plots are made of, lines and rows of values, and what becomes of them; and tables."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from lpl.base.terminal import printable
from lpl.report.scales import Scale, scale_for, short


class Line(NamedTuple):
    """A line of a plot."""

    label: str
    slot: str
    """Its colour and dashes: "1".."8", "ink", "floor"."""
    x: Sequence[float]
    y: Sequence[float | None]
    """None: nothing was measured there."""
    low: Sequence[float | None] | None = None
    """With high: the edges of a band around the line."""
    high: Sequence[float | None] | None = None
    best: float | None = None
    """Where its best point is, to be marked."""


class Row(NamedTuple):
    """A value with its interval."""

    label: str
    slot: str
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    """What stands beside the label; empty: the numbers."""
    points: Sequence[float] = ()
    """Single values behind it."""
    noise: float | None = None
    noise_is: str = "what another seed alone changes"
    """Half the width of a band around the zero line: what chance alone does; and that in words."""
    mark: float | None = None
    mark_is: str = "the VAE's own floor"
    """A place to set against; and that in words."""


@dataclass(frozen=True)
class Chart:
    """A plot with its legend, text alternative and numbers."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, str]]
    """(label, slot)."""
    header: list[str]
    rows: list[list[str]]
    thinned: str = ""
    """What the table leaves out."""
    key: list[tuple[str, str]] = field(default_factory=list)
    """(class, text) of marks that are no line."""


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]


WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 24, 42
MOST_POINTS = 240
MARKED = 16
"""Lines of at most so many points have a mark at each."""
ROW, BAR = 38, 26
"""Height of a row, and where in it the interval is."""
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
    lines = [_usable(_thinned(line), log_x, log_y) for line in lines]
    across = [x for line in lines for x in line.x]
    along = [v for line in lines for part in (line.y, line.low or (), line.high or ()) for v in part if v is not None]
    x_scale = scale_for(across, LEFT, WIDTH - RIGHT, log_x)
    y_scale = scale_for(along, HEIGHT - BOTTOM, TOP, log_y, zero and not log_y)
    parts = [_grid(x_scale, y_scale), _axis_labels(x_label, y_label)]
    parts += [_band(line, x_scale, y_scale) for line in lines if line.low and line.high]
    parts += [_line(line, x_scale, y_scale) for line in lines]
    said = "; ".join(filter(None, (_in_words(line) for line in lines)))
    svg = _svg(title, f"{note} {y_label} against {x_label}. {said}.", HEIGHT, "".join(parts))
    legend = [(line.label, line.slot) for line in lines]
    header = [x_label, *(line.label for line in lines)]
    places = sorted(set(across))
    every = -(-len(places) // 40) if places else 1
    by_line = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    rows = [[short(x, 4), *(short(values.get(x), 4) for values in by_line)] for x in places[::every]]
    key = (
        [("swatch-best", "the best guidance by Fréchet distance")]
        if any(line.best is not None for line in lines)
        else []
    )
    thinned = f"every {every}. point" if every > 1 else ""
    return Chart(title, note, svg, legend, header, rows, thinned=thinned, key=key)


def interval_chart(
    title: str, note: str, rows: Sequence[Row], x_label: str, zero: bool = False, value_header: str = "value"
) -> Chart:
    """A plot of values with intervals, a row each.

    Args:
        title: of the plot.
        note: what it shows, a sentence.
        rows: from top to bottom.
        x_label: of the axis, with units.
        zero: a line at 0, which the axis holds.
        value_header: of the column of values in the table.
    """
    held = [v for row in rows for v in (row.value, row.low, row.high, *row.points) if v is not None]
    held += [s * row.noise for row in rows if row.noise is not None for s in (-1, 1)]
    held += [0.0] if zero else []
    held = [v for v in held if math.isfinite(v)]
    around = max(held) - min(held) if held else 0.0
    held += [row.mark for row in rows if row.mark is not None and min(held) - around < row.mark < max(held) + around]
    height = ROW * len(rows) + BOTTOM
    x_scale = scale_for(held, 10, WIDTH - RIGHT)
    parts = []
    for tick, label in _labels(x_scale, 6):
        x = x_scale(tick)
        lines = "".join(f"M{x:.1f} {ROW * number + BAR - 10}v20" for number in range(len(rows)))
        parts.append(f'<path class="{"zero" if zero and tick == 0 else "grid"}" d="{lines}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{label}</text>')
    for number, row in enumerate(rows):
        shows = number == 0 or row.mark != rows[number - 1].mark
        parts.append(_row(row, ROW * number, x_scale, shows))
    parts.append(f'<text class="axis" x="{WIDTH / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    said = "; ".join(f"{row.label}: {_figures(row)}" for row in rows)
    svg = _svg(title, f"{note} {said}.", height, "".join(parts), "rows")
    table = [[row.label, short(row.value, 4), _interval(row), short(row.noise), short(row.mark)] for row in rows]
    noises = ", or ".join(dict.fromkeys(row.noise_is for row in rows if row.noise is not None))
    marks = ", or ".join(dict.fromkeys(row.mark_is for row in rows if row.mark is not None))
    used = [True, True, True, bool(noises), bool(marks)]
    header, keep = ["", value_header, "95 % interval", "noise", "floor"], [i for i in range(5) if used[i]]
    key = [("swatch-noise", f"noise: {noises}")] if noises else []
    key += [("swatch-mark", f"{marks} (◂ ▸: beyond the axis)")] if used[4] else []
    return Chart(title, note, svg, [], [header[i] for i in keep], [[r[i] for i in keep] for r in table], key=key)


def escape(text: str) -> str:
    """A text as markup; what would turn the direction of the text around it is shown as an escape."""
    return html.escape(printable(text))


def _svg(title: str, description: str, height: float, content: str, kind: str = "lines") -> str:
    number = next(_number)
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="t{number} d{number}">'
        f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(description)}</desc>{content}</svg>'
    )


def _labels(scale: Scale, number: int) -> list[tuple[float, str]]:
    ticks = scale.ticks(number)
    for digits in range(2, 7):
        labels = [short(tick, digits) for tick in ticks]
        if len(set(labels)) == len(ticks):
            break
    return list(zip(ticks, labels, strict=True))


def _grid(x_scale: Scale, y_scale: Scale) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick, label in _labels(y_scale, 5):
        y = y_scale(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in _labels(x_scale, 6):
        x = x_scale(tick)
        parts.append(f'<path class="base" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="base" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _axis_labels(x_label: str, y_label: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    # Above the axis, not along it: turned text is hard to read.
    return (
        f'<text class="axis" x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" x="4" y="12">{escape(y_label)}</text>'
    )


def _line(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    path, marks, drawn = [], [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            drawn = False
            continue
        place = f"{x_scale(x):.1f} {y_scale(y):.1f}"
        path.append(("L" if drawn else "M") + place)
        drawn = True
        if len(line.x) <= MARKED:
            told = escape(f"{line.label}: {short(y, 4)} at {short(x, 4)}")
            a, b = place.split()
            marks.append(f'<circle class="dot s{line.slot}" cx="{a}" cy="{b}" r="3"><title>{told}</title></circle>')
            if x == line.best:
                marks.append(f'<circle class="best s{line.slot}" cx="{a}" cy="{b}" r="7"/>')
    name = f"<title>{escape(line.label)}</title>"
    return f'<path class="line s{line.slot}" d="{"".join(path)}">{name}</path>{"".join(marks)}' if path else ""


def _band(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    assert line.low is not None
    assert line.high is not None
    edges = [e for e in zip(line.x, line.low, line.high, strict=True) if e[1] is not None and e[2] is not None]
    if len(edges) == 1:
        [(x, low, high)] = edges
        assert low is not None
        assert high is not None
        return f'<path class="whisker s{line.slot}" d="M{x_scale(x):.1f} {y_scale(low):.1f}V{y_scale(high):.1f}"/>'
    if not edges:
        return ""
    upper = [f"{x_scale(x):.1f} {y_scale(high):.1f}" for x, _, high in edges if high is not None]
    lower = [f"{x_scale(x):.1f} {y_scale(low):.1f}" for x, low, _ in reversed(edges) if low is not None]
    return f'<path class="band s{line.slot}" d="M{"L".join(upper + lower)}Z"/>'


def _row(row: Row, top: float, scale: Scale, shows_mark: bool) -> str:
    y, parts = top + BAR, []
    if row.noise is not None:
        a, b = scale(-row.noise), scale(row.noise)
        parts.append(f'<rect class="noise" x="{a:.1f}" y="{y - 8}" width="{b - a:.1f}" height="16"/>')
    parts.append(f'<text class="label" x="10" y="{top + 12}">{escape(_cut(row.label, 38))}</text>')
    parts.append(
        f'<text class="value" x="{WIDTH - RIGHT}" y="{top + 12}" text-anchor="end">{escape(_figures(row))}</text>'
    )
    if row.low is not None and row.high is not None:
        a, b = scale(row.low), scale(row.high)
        parts.append(
            f'<path class="whisker s{row.slot}" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}v10M{b:.1f} {y - 5}v10"/>'
        )
    parts += [f'<circle class="point s{row.slot}" cx="{scale(v):.1f}" cy="{y}" r="2.5"/>' for v in row.points]
    parts.append(f'<circle class="dot s{row.slot}" cx="{scale(row.value):.1f}" cy="{y}" r="4.5"/>')
    if row.mark is not None and scale.low <= row.mark <= scale.high:
        parts.append(f'<path class="mark" d="M{scale(row.mark):.1f} {y - 9}v18"/>')
    elif row.mark is not None and shows_mark:
        x, anchor, text = (10, "start", f"◂ {short(row.mark)}")
        if row.mark > scale.high:
            x, anchor, text = (WIDTH - RIGHT, "end", f"{short(row.mark)} ▸")
        parts.append(f'<text class="label" x="{x}" y="{y + 4}" text-anchor="{anchor}">{text}</text>')
    return f"<g><title>{escape(f'{row.label}: {_figures(row)}')}</title>{''.join(parts)}</g>"


def _figures(row: Row) -> str:
    if row.text:
        return row.text
    interval = _interval(row)
    return short(row.value) if interval == "–" else f"{short(row.value)}  {interval}"


def _interval(row: Row) -> str:
    return "–" if row.low is None or row.high is None else f"[{short(row.low)}, {short(row.high)}]"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _in_words(line: Line) -> str:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if not known:
        return ""
    (first_x, first), (last_x, last) = known[0], known[-1]
    if len(known) == 1:
        return f"{line.label}: {short(first)} at {short(first_x, 4)}"
    return f"{line.label}: from {short(first)} at {short(first_x, 4)} to {short(last)} at {short(last_x, 4)}"


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
