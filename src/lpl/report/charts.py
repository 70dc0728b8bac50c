"""What charts and tables of the page hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lpl.report.numbers import short


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


class IntervalRow(NamedTuple):
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

    @property
    def interval(self) -> str:
        """In square brackets."""
        return "–" if self.low is None or self.high is None else f"[{short(self.low)}, {short(self.high)}]"

    @property
    def numbers(self) -> str:
        """What stands beside the label."""
        return self.text or short(self.value) + ("" if self.interval == "–" else f"  {self.interval}")


class LinePlot(NamedTuple):
    """Lines over an axis."""

    lines: Sequence[Line]
    x_label: str
    y_label: str
    log_x: bool
    log_y: bool
    zero: bool
    """The vertical axis begins at 0."""


class IntervalPlot(NamedTuple):
    """Values with intervals, a row each."""

    rows: Sequence[IntervalRow]
    x_label: str
    zero: bool
    """A line at 0, which the axis holds."""


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
    thinned: str
    """What the table leaves out, or nothing."""
    drawn: LinePlot | IntervalPlot
    """What it was drawn of, to draw or write it elsewhere."""
    key: list[tuple[str, str]] = field(default_factory=list)
    """(class, text) of marks that are no line."""


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]
