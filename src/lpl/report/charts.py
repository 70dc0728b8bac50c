"""The data of the page's charts and tables."""

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
    """x of its best point, which is marked."""


class IntervalRow(NamedTuple):
    """A value with its interval."""

    label: str
    slot: str
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    """Text beside the label; empty: the numbers."""
    points: Sequence[float] = ()
    """The single values that it summarises."""
    noise: float | None = None
    noise_is: str = "what another seed alone changes"
    """Half the width of a band around the zero line, for differences by chance alone; and its description."""
    mark: float | None = None
    mark_is: str = "the VAE's own floor"
    """A value to compare with; and its description."""

    @property
    def interval(self) -> str:
        """The interval in square brackets."""
        return "–" if self.low is None or self.high is None else f"[{short(self.low)}, {short(self.high)}]"

    @property
    def numbers(self) -> str:
        """The text beside the label."""
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
    """Draws a line at 0, which the axis then includes."""


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
    """Which points the table leaves out; empty: none."""
    drawn: LinePlot | IntervalPlot
    """The data it was drawn from, for other formats."""
    key: list[tuple[str, str]] = field(default_factory=list)
    """(class, text) of marks other than lines."""


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]
