"""Figures as a table for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

HEADER = ("metric", "value", "95 % interval", "VAE's floor", "better")


def format_table(result: Mapping[str, Any]) -> str:
    """The figures of an eval.json, a line each, then what was refused or is to be known.

    Args:
        result: see evaluation.command.
    """
    rows: list[tuple[str, ...]] = [HEADER]
    notes: defaultdict[str, list[str]] = defaultdict(list)
    floor = "VAE's floor" if result["options"]["against"] == "images" else "half : half"
    rows[0] = (*HEADER[:3], floor, HEADER[4])
    for name, metric in result["metrics"].items():
        ends = metric["interval"]
        interval = "-" if ends is None else f"{_number(ends[0])} .. {_number(ends[1])}"
        direction = "lower" if metric["lower_is_better"] else "higher"
        rows.append((name, _number(metric["value"]), interval, _number(metric["floor"]), direction))
        if metric["note"]:
            notes[metric["note"]].append(name)
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    title = f"{result['num_samples']} samples of {result['model']} against {result['num_reference']} {_what(result)}"
    marked = [f"{', '.join(names)}: {note}" for note, names in notes.items() if not note.startswith("refused")]
    told = [*marked, *(f"skipped: {line}" for line in result["refused"])]
    return "\n".join([title, "", *lines, *([""] if told else []), *told])


def _what(result: Mapping[str, Any]) -> str:
    kind = "images" if result["options"]["against"] == "images" else "images as the VAE reconstructs them"
    return f"{kind} of {result['reference']}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
